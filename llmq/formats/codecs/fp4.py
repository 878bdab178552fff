"""Weights that are floats of four bits: E2M1, one sign bit, two exponent bits, one fraction bit.

    code    0    1    2    3    4    5    6    7       8 to 15: the same, negative
    value   0   .5    1  1.5    2    3    4    6

A byte holds two codes, the even input in the low half.  Groups of inputs share a scale.  In nvfp4, 16 inputs share a
float8 (E4M3), which is divided by one float32 for the whole weight.  In mxfp4, 32 inputs share a power of two (E8M0:
2 ** (byte - 127)).

    weight_packed        uint8 (N, K / 2)
    weight_scale         float8_e4m3fn (N, K / 16), or uint8 (N, K / 32)
    weight_global_scale  float32 (1,)                                      nvfp4 only

Such a weight has no integer grid, so it is read as floats.  These formats are never written.

Source: github.com/vllm-project/compressed-tensors, compressors/nvfp4 and mxfp4; OCP Microscaling Formats 1.0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.codecs import checks

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_GROUP, MXFP4_GROUP = 16, 32
EXPONENT_OF_ONE = 127


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
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=packed.device)
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)  # (…, K)
    return table[both.long()]


def powers(scales: Tensor) -> Tensor:
    """uint8 -> float32 2 ** (byte - 127)"""
    return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.to(torch.int32) - EXPONENT_OF_ONE)


def _read(tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...], group: int) -> tuple[Tensor, Tensor]:
    packed = checks.stored(tensors, "weight_packed", (torch.uint8,), (None, None))
    N, K = packed.shape[0], 2 * packed.shape[1]
    if K % group:
        raise FormatError(f"a weight has {K} input features, expected a multiple of the group size {group}")
    return values_of(packed), checks.stored(tensors, "weight_scale", dtypes, (N, K // group))


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """(N, K) times (N, G)"""
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
