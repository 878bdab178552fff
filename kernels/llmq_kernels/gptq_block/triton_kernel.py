"""128 columns per launch.  A program holds 16 rows of W x 128 columns in registers and quantizes column after column.

Rows are independent, so programs share nothing and write to separate memory: no atomics, no order between programs, the
same bits on every run.  All columns after the block are updated by one product of the errors with the factor
(`torch.baddbmm`, in stream order) per block.  The host reads nothing back, so a whole weight is queued without a stop.

Inside a program

* **one warp.**  The tile is (128 columns, 16 rows), rows innermost: a load of four neighbouring rows is one word of
  16 bytes, and each thread has 16 columns of 4 rows.  The current column is selected by a sum over a mask, which is
  exact because all other terms are zero; within a warp it takes three shuffles and no barrier.
* **the row of U, scale, zero point and pivot of the next column are loaded while this column is computed**, as they do
  not depend on it; codes and errors are stored at once and take no registers.
* **a code is the same as in torch, bit for bit, for the same target**: the division is correctly rounded (`div_rn`);
  ties go to the even code because adding 2**23 to a float32 in [0, 255] leaves no fraction and rounds to nearest even.
  That sum has no product next to it, so it cannot be fused.  Clamping first gives the same code: rounding is monotonic,
  and both ends are integers.

Targets differ from those of torch in their last bits, because sums are fused and ordered differently there.  So a code
differs only where a target lies that close to the middle between two codes.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.gptq_block.problem import Problem
from llmq_kernels.triton_rounding import nearest_code

BLOCK = 128  # columns per launch
ROWS = 16  # rows of W per program
WARPS = 1


@triton.jit
def _load_column(upper, scales, zeros, group_of, i, upper_row, upper_column, N, row, inside, position, width):
    """Of column i: U_i,: after the diagonal (BLOCK,), else 0; U_ii; scale and zero point (ROWS,)."""
    U_i = upper + i * upper_row
    behind = tl.load(U_i + position * upper_column, mask=(position > i) & (position < width), other=0.0)
    pivot = tl.load(U_i + i * upper_column)
    group = tl.load(group_of + i)
    scale = tl.load(scales + group * N + row, mask=inside, other=1.0)
    zero = tl.load(zeros + group * N + row, mask=inside, other=0.0)
    return behind, pivot, scale, zero


@triton.jit
def quantize_block(
    columns,
    codes,
    errors,
    upper,
    scales,
    zeros,
    group_of,
    N,
    levels,
    width,
    columns_expert,
    columns_column,
    columns_row,
    codes_expert,
    errors_expert,
    upper_expert,
    upper_row,
    upper_column,
    grid_expert,
    group_of_expert,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Quantize `width` columns; the pointers are at the block's first column.

    columns (E, K, N) float32 are read, codes (E, K, N) uint8 and errors (E, BLOCK, N) float32 written.
    Arguments named ARRAY_AXIS are strides in elements; an axis without one is contiguous.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of W
    expert = tl.program_id(1).to(tl.int64)
    position = tl.arange(0, BLOCK)  # of a column in the block
    inside = row < N
    columns += expert * columns_expert
    codes += expert * codes_expert
    errors += expert * errors_expert
    upper += expert * upper_expert
    scales += expert * grid_expert
    zeros += expert * grid_expert
    group_of += expert * group_of_expert

    here = columns + position[:, None] * columns_column + row[None, :].to(tl.int64) * columns_row
    present = (position[:, None] < width) & inside[None, :]
    tile = tl.load(here, mask=present, other=0.0)  # (BLOCK, ROWS)
    behind, pivot, scale, zero = _load_column(
        upper, scales, zeros, group_of, 0, upper_row, upper_column, N, row, inside, position, width
    )
    for i in range(width):
        after = tl.minimum(i + 1, width - 1)
        next_behind, next_pivot, next_scale, next_zero = _load_column(
            upper, scales, zeros, group_of, after, upper_row, upper_column, N, row, inside, position, width
        )
        target = tl.sum(tl.where(position[:, None] == i, tile, 0.0), axis=0)  # (ROWS,)
        code = nearest_code(tl.div_rn(target, scale) + zero, levels)
        error = tl.div_rn(target - (code - zero) * scale, pivot)
        tl.store(codes + i * N + row, code.to(tl.uint8), mask=inside)
        tl.store(errors + i * N + row, error, mask=inside)
        tile -= behind[:, None] * error[None, :]
        behind, pivot, scale, zero = next_behind, next_pivot, next_scale, next_zero


def quantize_columns(problem: Problem, codes: Tensor, start: int, stop: int) -> None:
    """See `op.quantize_columns`; a range wider than a block goes block by block."""
    columns, upper, scales, group_of = problem.columns, problem.upper, problem.scales, problem.group_of
    E, K, N = columns.shape
    errors = torch.empty(E, BLOCK, N, dtype=torch.float32, device=columns.device)
    launch = quantize_block[(triton.cdiv(N, ROWS), E)]
    with torch.cuda.device(columns.device) if columns.is_cuda else nullcontext():
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            launch(
                columns[:, first:], codes[:, first:], errors, upper[:, first:, first:], scales, problem.zeros,
                group_of[:, first:], N, float(problem.levels), last - first,
                *columns.stride(), codes.stride(0), errors.stride(0), *upper.stride(), scales.stride(0),
                group_of.stride(0), BLOCK=BLOCK, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
            of_block = errors[:, : last - first]
            columns[:, first:last] = of_block
            if last < K:
                later = upper[:, first:last, last:].mT  # (E, K - last, B)
                columns[:, last:].baddbmm_(later, of_block, alpha=-1)
