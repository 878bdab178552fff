"""A program holds ROWS rows of one group in registers and tries every candidate on them.

Programs share nothing: each reads its weights and writes its scale and zero point, so there are no races and the order
of programs does not matter.  The arithmetic of a candidate is that of torch, operation by operation: division is
correctly rounded (`div_rn`), ties go to the even code by adding 3 * 2**22 (steps beyond 2**22 do not occur: a scale is
at least a quarter of the one that spans the group), products and sums are not fused (`enable_fp_fusion=False`).  Only
the sum over the columns has another order, so a choice differs from torch only where two candidates tie to the last
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.grid_search.candidates import Candidates

TILE = 2048  # weights per program: 16 per thread, so that four programs fit a multiprocessor
WARPS = 4


@triton.jit
def _stored(scale, smallest, largest, STORED: tl.constexpr):
    """The scale as a file of the dtype STORED stores it, float32."""
    clamped = tl.minimum(tl.maximum(scale, smallest), largest)
    return clamped.to(STORED).to(tl.float32)


@triton.jit
def _error(weights, costs, scale, zero, levels):
    """s² Σ_j cost_j (code_j - zero - w_j / s)² of weights (ROWS, WIDTH) for scale and zero point (ROWS,)."""
    magic = 12582912.0  # 3 * 2**22
    steps = tl.div_rn(weights, scale[:, None])
    codes = (steps + magic) - magic
    codes = tl.minimum(tl.maximum(codes, -zero[:, None]), levels - zero[:, None])
    off = codes - steps
    return tl.sum(off * off * costs[None, :], axis=1) * (scale * scale)


@triton.jit
def search_groups(
    groups, costs, first_scales, first_zeros, widest, zeros, factors, offsets, scales_out, zeros_out,
    R, G, width, levels, smallest, largest, row_stride, group_stride,
    FACTORS: tl.constexpr, OFFSETS: tl.constexpr, LEAST_SHIFT: tl.constexpr, SHIFTS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """groups (R, G, width) float32, costs (G, width), per group (R, G) float32; factors, offsets float32 arrays.

    scales_out (R, G) has the dtype of the file.  Grid: (blocks of ROWS rows, groups).  Columns beyond `width` hold
    weight 0, which has no error.
    """
    STORED: tl.constexpr = scales_out.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = row < R
    present = column < width
    start = row.to(tl.int64) * row_stride + group * group_stride
    weights = tl.load(groups + start[:, None] + column[None, :], mask=inside[:, None] & present[None, :], other=0.0)
    column_costs = tl.load(costs + group * width + column, mask=present, other=0.0)
    place = row.to(tl.int64) * G + group
    span = tl.load(widest + place, mask=inside, other=1.0)
    zero = tl.load(zeros + place, mask=inside, other=0.0)
    best_scale = tl.load(first_scales + place, mask=inside, other=1.0)
    best_zero = tl.load(first_zeros + place, mask=inside, other=0.0)
    best = _error(weights, column_costs, best_scale, best_zero, levels)
    for i in range(FACTORS):
        scale = _stored(span * tl.load(factors + i), smallest, largest, STORED)
        error = _error(weights, column_costs, scale, zero, levels)
        lower = error < best
        best = tl.where(lower, error, best)
        best_scale = tl.where(lower, scale, best_scale)
        best_zero = tl.where(lower, zero, best_zero)
    centre = best_scale
    for i in range(OFFSETS):
        scale = _stored(centre + span * tl.load(offsets + i), smallest, largest, STORED)
        for shift in range(SHIFTS):
            shifted = tl.minimum(tl.maximum(zero + (LEAST_SHIFT + shift), 0.0), levels)
            error = _error(weights, column_costs, scale, shifted, levels)
            lower = error < best
            best = tl.where(lower, error, best)
            best_scale = tl.where(lower, scale, best_scale)
            best_zero = tl.where(lower, shifted, best_zero)
    tl.store(scales_out + place, best_scale.to(STORED), mask=inside)
    tl.store(zeros_out + place, best_zero, mask=inside)


def search(
    groups: Tensor,
    costs: Tensor,
    first: tuple[Tensor, Tensor],
    widest: Tensor,
    zeros: Tensor,
    candidates: Candidates,
) -> tuple[Tensor, Tensor]:
    """See `op.search`; costs are (G, g), g at most TILE."""
    R, G, g = groups.shape
    if groups.stride(2) != 1:
        groups = groups.contiguous()
    per_group = [part.contiguous() for part in (*first, widest, zeros)]
    values = (candidates.factors, candidates.offsets)
    factors, offsets = (torch.tensor(numbers, dtype=torch.float32, device=groups.device) for numbers in values)
    scales, chosen = torch.empty(R, G, dtype=candidates.dtype, device=groups.device), torch.empty_like(per_group[2])
    width = triton.next_power_of_2(g)
    rows = max(1, TILE // width)
    with torch.cuda.device_of(groups):  # Triton launches on the current device; nothing for a CPU tensor
        search_groups[(triton.cdiv(R, rows), G)](
            groups, costs.contiguous(), *per_group, factors, offsets, scales, chosen,
            R, G, g, float(candidates.levels), candidates.smallest, torch.finfo(candidates.dtype).max,
            groups.stride(0), groups.stride(1),
            FACTORS=len(candidates.factors), OFFSETS=len(candidates.offsets),
            LEAST_SHIFT=min(candidates.shifts), SHIFTS=len(candidates.shifts),
            ROWS=rows, WIDTH=width, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return scales.to(torch.float32), chosen
