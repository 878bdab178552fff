"""Launches the two kernels of `triton_kernel.py`: which one, with which tiles, after sorting the pairs.

Nothing here waits for the device: sizes come from shapes alone, so that a CUDA graph can hold a call.  The numbers are
choices by reasoning, not by measurement.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16)
PLANE = 32  # columns of a tile that share a nibble

PAIRS_ALONE = 8  # so few run alone whatever the number of experts


@dataclass(frozen=True)
class Tiles:
    """One program: block_m pairs times block_n rows of a weight, loads `stages` ahead; block_m 1 is kernel `alone`."""

    block_m: int
    block_n: int
    warps: int
    stages: int


ALONE = Tiles(1, 32, 4, 4)
# The first whose block_m is no less than the pairs that an expert has on average: fuller blocks read weights less
# often, emptier ones compute what nobody needs.
GROUPED = (Tiles(16, 64, 4, 4), Tiles(32, 128, 8, 4), Tiles(64, 128, 8, 3))


def covers(x: Tensor, *, bits: int, in_features: int, columns_per_group: int) -> bool:
    """Whether the kernels know this weight and this x: 4 bits, half precision, groups of 32 columns or a multiple."""
    return bits == 4 and x.dtype in FLOATS and (columns_per_group % PLANE == 0 or columns_per_group >= in_features)


def experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    in_features: int,
    columns_per_group: int,
    tiles: Tiles | None = None,
    assembly: bool | None = None,
) -> Tensor:
    """`reference.experts` in x's dtype, (P, N).  `op.check` and `covers` have seen the arguments.

    `tiles` are `ALONE` or those of the grouped kernel; None chooses.  `assembly` is whether to unpack by `lop3` (not in
    Triton's interpreter, which has none); None chooses.
    """
    from llmq_kernels.w4a16_experts import triton_kernel

    P, (E, N, _), G = token.shape[0], words.shape, scales.shape[1]
    out = x.new_empty(P, N)
    if P == 0 or N == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    tiles = tiles or tiles_for(P, E)
    constants = {
        "PLANES": 0 if columns_per_group >= in_features else columns_per_group // PLANE,
        "HAS_ZEROS": zeros is not None,
        "HAS_BIAS": bias is not None,
        "ASSEMBLY": x.is_cuda if assembly is None else assembly,
        "enable_fp_fusion": True,  # said, because its default is changing
    }
    weights = (words, scales, scales if zeros is None else zeros, scales if bias is None else bias)
    with torch.cuda.device_of(x):  # does nothing for a CPU tensor
        if tiles.block_m == 1:
            triton_kernel.alone[(P, -(-N // tiles.block_n))](
                x, token, expert, *weights, out, N, in_features, G, x.stride(0),
                **constants, **_launched(tiles),
            )  # fmt: skip
        else:
            pairs, first_pair = sorted_pairs(expert, E)
            triton_kernel.grouped[(most_blocks(P, E, tiles.block_m), -(-N // tiles.block_n))](
                x, token, pairs, first_pair, *weights, out, N, in_features, G, E, x.stride(0),
                **constants, **_launched(tiles), EXPERTS=max(2, 1 << (E - 1).bit_length()), BLOCK_M=tiles.block_m,
            )  # fmt: skip
    return out


def tiles_for(P: int, E: int) -> Tiles:
    """The tiles for P pairs over E experts; `ALONE` up to half a pair an expert.

    P = E / 2 draws from E experts hit 0.39 E of them, so that hardly any weight is read for two pairs, and sorting
    would only cost a decoding step more launches.  Of 128 experts, 8 a token, that is up to 8 tokens.
    """
    if P <= max(PAIRS_ALONE, E // 2):
        return ALONE
    return next((tiles for tiles in GROUPED if P <= tiles.block_m * E), GROUPED[-1])


def sorted_pairs(expert: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """`pairs` (P,) int64 in the order of their experts, `first_pair` (E + 1,) int64 where each expert's begin."""
    in_order, pairs = torch.sort(expert, stable=True)
    bounds = torch.arange(E + 1, dtype=expert.dtype, device=expert.device)
    return pairs, torch.searchsorted(in_order, bounds)


def most_blocks(P: int, E: int, block_m: int) -> int:
    """An upper bound of the blocks of block_m pairs that P pairs over E experts need, however they fall.

    An expert with c pairs fills at most (c + block_m - 1) / block_m blocks, and at most min(P, E) experts have any.
    """
    return (P + min(P, E) * (block_m - 1)) // block_m


def _launched(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
