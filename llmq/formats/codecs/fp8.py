"""Weights that are floats of eight bits (E4M3) with a scale per row or block: `float-quantized` of compressed-tensors.

    weight        float8_e4m3fn (N, K)
    weight_scale  float (N, 1)           or one number for the whole weight, which is read as one per row
                  float (B, G)           strategy "block": one per 128 rows and 128 columns, B = ceil(N / 128)

In llmq such a weight is on the grid `fp8` or `fp8-block` (`numerics/float_grid.py`), whose codes are in ascending order
and have one zero, so that -0 is read as 0.  Scales of blocks are repeated for each of their rows, (N, G).

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
ROWS, BLOCKS = WeightScheme.of_floats("fp8"), WeightScheme.of_floats("fp8-block")


def weights_block(scheme: WeightScheme) -> dict[str, Any]:
    """How config.json declares such weights."""
    declared = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
    if scheme == ROWS:
        return {**declared, "strategy": "channel"}
    return {**declared, "strategy": "block", "block_structure": [scheme.rows_per_scale, scheme.group_size]}


def declared_scheme(weights: Mapping[str, Any]) -> WeightScheme:
    """The grid that a block in config.json declares by its strategy."""
    return BLOCKS if weights.get("strategy") == "block" else ROWS


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight on the grid `fp8` or `fp8-block`."""
    scales = q.scales[:: q.scheme.rows_per_scale].contiguous()
    if not torch.equal(_by_row(scales, q.scheme, len(q.codes)), q.scales):
        raise FormatError("the rows of a block have different scales, expected one scale per block")
    return {"weight": E4M3.values(q.codes).to(torch.float8_e4m3fn), "weight_scale": scales}


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    """The inverse of `pack`, also for files of other writers; raises FormatError for a NaN."""
    values, scales = _read(tensors, scheme)
    if not bool(values.isfinite().all()):
        raise FormatError("a weight is NaN, expected finite numbers", hint="the checkpoint is damaged")
    return QuantizedTensor(E4M3.nearest(values), scales, None, scheme)


def decode_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * scale"""
    values, scales = _read(tensors, ROWS)
    return values * scales.to(torch.float32)


def decode_blocks(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * scale"""
    values, scales = _read(tensors, BLOCKS)
    weight: Tensor = values.unflatten(1, (scales.shape[1], -1)) * scales.to(torch.float32)[..., None]
    return weight.flatten(1)


def _read(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """The values (N, K) float32, and the scales (N, G)."""
    values = checks.stored(tensors, "weight", (torch.float8_e4m3fn,), (None, None)).to(torch.float32)
    (N, K), scale = values.shape, tensors.get("weight_scale")
    if scheme == ROWS and scale is not None and scale.numel() == 1:
        return values, scale.reshape(1, 1).expand(N, 1).contiguous()
    if not K or K % scheme.columns_per_group(K):
        raise FormatError(f"a weight has {K} columns, expected whole groups ({scheme.group_size})")
    shape = (-(-N // scheme.rows_per_scale), K // scheme.columns_per_group(K))
    return values, _by_row(checks.stored(tensors, "weight_scale", checks.SCALE_DTYPES, shape), scheme, N)


def _by_row(scales: Tensor, scheme: WeightScheme, rows: int) -> Tensor:
    """Scales (B, G) of blocks of rows -> (N, G)"""
    return scales.repeat_interleave(scheme.rows_per_scale, dim=0)[:rows]
