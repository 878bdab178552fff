"""Weights of 8 bits in the layout of torch's own int8 product.  See `small_batches.py`.

torch has a vectorized y = scale * (x Cᵀ) with signed bytes C and one scale per row, for bfloat16 x.

    cpu_words  (N, K) int8         code - 128
    cpu_grid   (N,) bfloat16       scales

Where K is not a multiple of its vectors, torch 2.13 reads past the end of memory, so such weights are not taken.
"""

import torch
from torch import Tensor

from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

COLUMNS = 64  # K must be a multiple of it; 16 are enough on AVX2


def pair(weight: PackedWeight[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(cpu_words, cpu_grid) of a weight of 8 bits on a CPU; None unless it is symmetric, with one scale per row."""
    words, scales, zeros, _, in_features, *_ = weight
    if zeros is not None or scales.shape[0] != 1 or in_features % COLUMNS:
        return None
    signed = (layout.unpack(words, 8, in_features).to(torch.int16) - 128).to(torch.int8)
    return signed.contiguous(), scales[0].to(torch.bfloat16).contiguous()


def product(rows: Tensor, words: Tensor, grid: Tensor) -> Tensor:
    """(M, K) bfloat16 -> (M, N) bfloat16"""
    y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, words, grid)
    return y
