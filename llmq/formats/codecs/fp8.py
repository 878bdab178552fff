"""Weights that are floats of eight bits (E4M3) with a scale per row: `float-quantized` of compressed-tensors.

    weight        float8_e4m3fn (N, K)
    weight_scale  float (N, 1)           or one number for the whole weight, which is read as one per row

In llmq such a weight is on the grid `fp8` (`numerics/float_grid.py`), whose codes are in ascending order and have one
zero, so that -0 is read as 0.

Source: github.com/vllm-project/compressed-tensors, compressors/naive_quantized.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.codecs import checks
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.value_tables import E4M3

PACKING = "float-quantized"
SCHEME = WeightScheme.of_floats("fp8")
DECLARED: dict[str, Any] = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
}  # fmt: skip


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight on the grid `fp8`."""
    return {"weight": E4M3.values(q.codes).to(torch.float8_e4m3fn), "weight_scale": q.scales.contiguous()}


def unpack(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The inverse of `pack`, also for files of other writers; raises FormatError for a NaN."""
    values, scales = _read(tensors)
    if not bool(values.isfinite().all()):
        raise FormatError("a weight is NaN, expected finite numbers", hint="the checkpoint is damaged")
    return QuantizedTensor(E4M3.nearest(values), scales, None, SCHEME)


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * scale"""
    values, scales = _read(tensors)
    return values * scales.to(torch.float32)


def _read(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    values = checks.stored(tensors, "weight", (torch.float8_e4m3fn,), (None, None)).to(torch.float32)
    N, scale = len(values), tensors.get("weight_scale")
    if scale is not None and scale.numel() == 1:
        return values, scale.reshape(1, 1).expand(N, 1).contiguous()
    return values, checks.stored(tensors, "weight_scale", checks.SCALE_DTYPES, (N, 1))
