"""Launches the two kernels of `triton_kernel.py`: which one, with which tiles, after sorting the pairs.

Nothing here synchronizes with the device: sizes come from shapes only, so that a CUDA graph can capture a call.  The
tile sizes were chosen by reasoning and have not been measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.w4a16.gpu import aligned
from llmq_kernels.w4a16.packed_weight import PackedWeight

HALVES = (torch.float16, torch.bfloat16)
PLANE = 32  # columns of a tile that share a nibble

PAIRS_ALONE = 8  # up to this many run alone for any number of experts


@dataclass(frozen=True)
class Tiles:
    """One program: block_m pairs times block_n rows of a weight, loads `stages` ahead; block_m 1 is kernel `alone`."""

    block_m: int
    block_n: int
    warps: int
    stages: int


ALONE = Tiles(1, 32, 4, 4)
# The first whose block_m is at least the average number of pairs per expert: fuller blocks read weights less often,
# emptier ones do unused work.
GROUPED = (Tiles(16, 64, 4, 4), Tiles(32, 128, 8, 4), Tiles(64, 128, 8, 3))


def covers(x: Tensor, weight: PackedWeight[Tensor]) -> bool:
    """Whether the kernels can run it: 4 bits, half precision, groups of a multiple of 32 columns or the whole row."""
    grouped = weight.columns_per_group % PLANE == 0 or weight.columns_per_group >= weight.in_features
    return weight.bits == 4 and x.dtype in HALVES and grouped


def experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: PackedWeight[Tensor],
    bias: Tensor | None,
    *,
    tiles: Tiles | None = None,
    assembly: bool | None = None,
) -> Tensor:
    """`reference.experts` in x's dtype, (P, N).  `op.check` and `covers` have accepted the arguments.

    `tiles` are `ALONE` or those of the grouped kernel, `assembly` is whether to unpack by `lop3` (which Triton's
    interpreter does not have); None chooses.
    """
    from llmq_kernels.w4a16_experts import triton_kernel

    words, scales, zeros = weight[:3]
    P, (E, N, _), G = token.shape[0], words.shape, scales.shape[1]
    out = x.new_empty(P, N)
    if P == 0 or N == 0:
        return out
    x = aligned(x if x.stride(1) == 1 else x.contiguous())
    tiles = tiles or tiles_for(P, E)
    constants = {
        "PLANES": weight.planes,
        "HAS_ZEROS": zeros is not None,
        "HAS_BIAS": bias is not None,
        "ASSEMBLY": x.is_cuda if assembly is None else assembly,
        "enable_fp_fusion": True,  # explicit, because its default is changing
    }
    arrays = (words, scales, scales if zeros is None else zeros, scales if bias is None else bias)
    with torch.cuda.device_of(x):  # does nothing for a CPU tensor
        if tiles.block_m == 1:
            triton_kernel.alone[(P, -(-N // tiles.block_n))](
                x, token, expert, *arrays, out, N, weight.in_features, G, x.stride(0),
                **constants, **_launched(tiles),
            )  # fmt: skip
        else:
            pairs, first_pair = sorted_pairs(expert, E)
            triton_kernel.grouped[(most_blocks(P, E, tiles.block_m), -(-N // tiles.block_n))](
                x, token, pairs, first_pair, *arrays, out, N, weight.in_features, G, E, x.stride(0),
                **constants, **_launched(tiles), EXPERTS=max(2, 1 << (E - 1).bit_length()), BLOCK_M=tiles.block_m,
            )  # fmt: skip
    return out


def tiles_for(P: int, E: int) -> Tiles:
    """The tiles for P pairs over E experts; `ALONE` up to half a pair per expert.

    P = E / 2 draws from E experts hit 0.39 E of them, so hardly any weight is read for two pairs, and sorting would
    only add launches to a decoding step.  With 128 experts, 8 per token, that is up to 8 tokens.
    """
    if P <= max(PAIRS_ALONE, E // 2):
        return ALONE
    return next((tiles for tiles in GROUPED if P <= tiles.block_m * E), GROUPED[-1])


def sorted_pairs(expert: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """`pairs` (P,) int64 in the order of their experts, `first_pair` (E + 1,) int64 where each expert begins."""
    in_order, pairs = torch.sort(expert, stable=True)
    bounds = torch.arange(E + 1, dtype=expert.dtype, device=expert.device)
    return pairs, torch.searchsorted(in_order, bounds)


def most_blocks(P: int, E: int, block_m: int) -> int:
    """An upper bound of the blocks of block_m pairs that P pairs over E experts need, for any routing.

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
