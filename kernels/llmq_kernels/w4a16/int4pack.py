"""Weights of 4 bits in the layout of torch's own int4 product.  See `small_batches.py`.

torch has a vectorized y = x Wᵀ with W[n, k] = scale * (code - 8) + shift in 4 bits, which never writes W to memory.
Its layout depends on the instruction set of the processor:

    cpu_words  (N, K / 2) uint8           opaque
    cpu_grid   (K / group, N, 2) bfloat16   [..., 0] scale, [..., 1] shift = (8 - zero) * scale
"""

import torch
from torch import Tensor

from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

GROUPS = (256, 128, 64, 32)  # columns that may share a scale, as torch's op checks
ROWS_OF_LAYOUT = 16  # N must be a multiple of it
ROWS_AT_ONCE = 512  # of W, in packing: a multiple of every block of rows that the op's layouts have (32, 64)


def pair(weight: PackedWeight[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(cpu_words, cpu_grid) of a weight of 4 bits on a CPU, or None where torch's op cannot represent it.

    It needs N a multiple of 16, groups of a multiple of 32 columns that divide K, and zero points in [0, 16]: a larger
    shift in bfloat16 would leave no precision for the code.
    """
    words, scales, zeros, _, in_features, columns_per_group, *_ = weight
    N, group = words.shape[0], group_of(in_features, columns_per_group, single=scales.shape[0] == 1)
    if N % ROWS_OF_LAYOUT or group is None:
        return None
    if zeros is not None and bool(((zeros < 0) | (zeros > 16)).any()):
        return None
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(layout.unpack(piece, 4, in_features).to(torch.int32), 1)
        for piece in torch.split(words, ROWS_AT_ONCE)
    ]
    scale = scales.to(torch.float32)  # (G, N)
    shift = torch.zeros_like(scale) if zeros is None else (8 - zeros) * scale
    pieces = in_features // group  # each group is divided into pieces of a size that the op knows
    grid = torch.stack([scale, shift], dim=2).to(torch.bfloat16)  # (G, N, 2)
    repeated = grid.repeat_interleave(max(1, min(columns_per_group, in_features) // group), dim=0)[:pieces]
    return torch.cat(packed), repeated.contiguous()


def product(rows: Tensor, words: Tensor, grid: Tensor) -> Tensor:
    """(M, K) bfloat16 -> (M, N) bfloat16"""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, rows.shape[1] // grid.shape[0], grid)
    return y


def group_of(in_features: int, columns_per_group: int, *, single: bool) -> int | None:
    """The widest run of columns that torch's op knows and that has no group boundary inside."""
    for group in GROUPS:
        if in_features % group == 0 and (single or columns_per_group % group == 0):
            return group
    return None
