"""gram += XᵀX for float16 and bfloat16, one tile of 128 x 128 per program, on tensor cores.

Both operands of a tile are strips of the same X (T, K).  The left one is addressed transposed, so that it is copied
along its rows in memory, and the tensor cores read it transposed from shared memory.  Products are exact in float32,
and are summed in float32.

* A program owns its tile and goes through T from front to back: no atomics, no splits, the same bits on every run.
* With `UPPER_ONLY`, programs below the diagonal return immediately; the tiles on it are computed whole.
* Programs that run at the same time should share strips of X, which are then read from DRAM once and from L2 after
  that: eight rows of tiles are processed together, column by column.
* A width that is not a multiple of 16 is correct but slow, loaded element by element with registers spilled: `op.py`
  sends such X to cuBLAS.
* The sum starts at zero and is added to `gram` at the end.  Tensor cores may truncate sums to float32 instead of
  rounding them; the T / 16 steps of a call lose at most 2**-23 each, so with 16,384 tokens per call the second moment
  is low by at most 1.3e-4 relative, compared with a relative step of 4e-3 in bfloat16 inputs.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # of the result, both ways
TILE_ROWS_TOGETHER = 8
ALIGNMENT = 16  # of rows, in elements: Triton copies 16 bytes at once only then


@dataclass(frozen=True)
class Config:
    """Tokens of X per step, steps in flight, warps per program."""

    step: int
    stages: int
    warps: int


HOPPER = Config(step=64, stages=4, warps=8)  # 128 KB of shared memory; two warpgroups, 64 rows of a tile each
AMPERE = Config(step=32, stages=4, warps=8)  # 48 KB, of the 99 KB of sm_86 and sm_89


def config_for(capability: tuple[int, int]) -> Config:
    return HOPPER if capability[0] in (9, 10) else AMPERE  # sm_120 has the shared memory of sm_89


@triton.jit
def second_moment(
    x,
    gram,
    T,
    K,
    x_row,
    UPPER_ONLY: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS_TOGETHER: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x (T, K) with rows `x_row` elements apart; gram (K, K) float32."""
    tiles = tl.cdiv(K, TILE)
    program = tl.program_id(0)
    together = TILE_ROWS_TOGETHER * tiles
    first_row = program // together * TILE_ROWS_TOGETHER
    rows_here = tl.minimum(tiles - first_row, TILE_ROWS_TOGETHER)
    tile_row = first_row + program % together % rows_here
    tile_column = program % together // rows_here
    if UPPER_ONLY:
        if tile_column < tile_row:
            return
    row = tile_row * TILE + tl.arange(0, TILE)  # of gram, and so a column of x
    column = tile_column * TILE + tl.arange(0, TILE)
    token = tl.arange(0, STEP)
    left = x + token[None, :] * x_row + row[:, None]  # (TILE, STEP), transposed as it is loaded
    right = x + token[:, None] * x_row + column[None, :]  # (STEP, TILE)
    row_there, column_there = (row < K)[:, None], (column < K)[None, :]
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in tl.range(0, T, STEP, num_stages=STAGES):
        token_there = start + token < T
        X_left = tl.load(left, mask=token_there[None, :] & row_there, other=0.0)
        X_right = tl.load(right, mask=token_there[:, None] & column_there, other=0.0)
        sums = tl.dot(X_left, X_right, sums)
        left += STEP * x_row
        right += STEP * x_row
    target = gram + row[:, None].to(tl.int64) * K + column[None, :]  # (K, K) may pass 2**31 elements
    present = row_there & column_there
    tl.store(target, tl.load(target, mask=present, other=0.0) + sums, mask=present)


def update(gram: Tensor, x: Tensor, *, upper_only: bool) -> None:
    """See `op.update`; x (T, K) is float16 or bfloat16."""
    T, K = x.shape
    if x.stride(1) != 1 or x.stride(0) % ALIGNMENT:
        x = x.contiguous()
    config = config_for(torch.cuda.get_device_capability(x.device)) if x.is_cuda else AMPERE
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        second_moment[(triton.cdiv(K, TILE) ** 2,)](
            x, gram, T, K, x.stride(0), UPPER_ONLY=upper_only, TILE=TILE, TILE_ROWS_TOGETHER=TILE_ROWS_TOGETHER,
            STEP=config.step, STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
