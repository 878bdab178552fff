"""Weights that are floats of four bits: E2M1, one sign bit, two exponent bits, one fraction bit.

    code    0    1    2    3    4    5    6    7       8 to 15: the same, negative
    value   0   .5    1  1.5    2    3    4    6

A byte holds two codes, the even input in the low half.  Groups of inputs share a scale.  In nvfp4, 16 inputs share a
float8 (E4M3), which is divided by one float32 for the whole weight.  In mxfp4, 32 inputs share a power of two (E8M0:
2 ** (byte - 127)).

    weight_packed        uint8 (N, K / 2)
    weight_scale         float8_e4m3fn (N, K / 16), or uint8 (N, K / 32)
    weight_global_scale  float32 (1,)                                      nvfp4 only

In llmq such a weight is on a grid of floats (`numerics/float_grid.py`), whose codes are in ascending order and have one
zero, so that -0 is read as 0.  A file is written with the scales exactly as they are, or not at all.

Source: github.com/vllm-project/compressed-tensors, compressors/nvfp4 and mxfp4; OCP Microscaling Formats 1.0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.codecs import checks
from llmq.numerics import float_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.value_tables import E2M1

NVFP4_GROUP, MXFP4_GROUP = 16, 32
NEGATIVE = 8  # the sign bit
EXPONENT_OF_ONE = 127
MAGNITUDES = E2M1.numbers[E2M1.zero :]


def nvfp4(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * (scale / global scale)"""
    values, scales = _read(tensors, (torch.float8_e4m3fn,), NVFP4_GROUP)
    whole = checks.stored(tensors, "weight_global_scale", (torch.float32,), (1,))
    return _scaled(values, scales.to(torch.float32) / whole)


def mxfp4(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * 2 ** (scale - 127)"""
    values, scales = _read(tensors, (torch.uint8,), MXFP4_GROUP)
    return _scaled(values, powers(scales))


def values_of(packed: Tensor) -> Tensor:
    """uint8 (…, K / 2) -> float32 (…, K)"""
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=packed.device)
    return table[_halves(packed).long()]


def weights_block(scheme: WeightScheme) -> dict[str, Any]:
    """How config.json of compressed-tensors declares such weights."""
    nvfp4 = scheme.floats == "nvfp4"
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if nvfp4 else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
    }


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight on a grid of floats; raises FormatError for scales that the file cannot hold."""
    distance = q.codes.to(torch.int16) - E2M1.zero
    codes = torch.where(distance < 0, NEGATIVE - distance, distance).to(torch.uint8)
    packed = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()}
    if not torch.equal(float_grid.storable(q.scales, q.scheme, q.shared), q.scales):
        raise FormatError(f"a scale is not one that {q.scheme} has")
    if q.global_scale is None:
        exponents = torch.frexp(q.scales).exponent - 1
        return packed | {"weight_scale": (exponents + EXPONENT_OF_ONE).to(torch.uint8)}
    if not bool((q.global_scale == q.global_scale[0]).all()):
        raise FormatError("the rows of a weight have different global scales, expected one")
    numbers = (q.scales * q.global_scale).to(torch.float8_e4m3fn)
    return packed | {"weight_scale": numbers, "weight_global_scale": q.global_scale[0].contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    """The inverse of `pack`, also for files of other writers."""
    group = int(scheme.columns_per_group(0))
    dtype, powers_of_two = (torch.uint8, True) if scheme.floats == "mxfp4" else (torch.float8_e4m3fn, False)
    packed, numbers = _stored(tensors, (dtype,), group)
    stored = _halves(packed).to(torch.int16)
    magnitude = stored & (NEGATIVE - 1)
    codes = torch.where(stored < NEGATIVE, E2M1.zero + magnitude, E2M1.zero - magnitude).to(torch.uint8)
    if powers_of_two:
        return QuantizedTensor(codes, powers(numbers), None, scheme)
    whole = checks.stored(tensors, "weight_global_scale", (torch.float32,), (1,))
    shared = whole.expand(len(codes), 1).contiguous()
    return QuantizedTensor(codes, numbers.to(torch.float32) / whole, None, scheme, global_scale=shared)


def powers(scales: Tensor) -> Tensor:
    """uint8 -> float32 2 ** (byte - 127)"""
    return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.to(torch.int32) - EXPONENT_OF_ONE)


def _read(tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...], group: int) -> tuple[Tensor, Tensor]:
    packed, scales = _stored(tensors, dtypes, group)
    return values_of(packed), scales


def _halves(packed: Tensor) -> Tensor:
    """uint8 (…, K / 2) -> (…, K), each below 16"""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _stored(tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...], group: int) -> tuple[Tensor, Tensor]:
    packed = checks.stored(tensors, "weight_packed", (torch.uint8,), (None, None))
    N, K = packed.shape[0], 2 * packed.shape[1]
    if K % group:
        raise FormatError(f"a weight has {K} input features, expected a multiple of the group size {group}")
    return packed, checks.stored(tensors, "weight_scale", dtypes, (N, K // group))


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """(N, K) times (N, G)"""
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
