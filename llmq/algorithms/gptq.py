"""GPTQ: quantize one column at a time, and let the later columns compensate for the error.

Frantar et al. 2022 (arXiv:2210.17323).  With H = XᵀX/T + λI and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), for
each column j in order

    e = (w_j - ŵ_j) / U_jj        w_{j:} -= e · U_{j,j:}

Rows are independent.  Columns are processed in blocks of 128: the update is applied at once inside a block, and by one
matrix product per block to the later columns.  That loop is `llmq_kernels.gptq_block`.  *Codes* are the quantized
values, unsigned integers.  Differences from the paper, each measured as better (docs/DECISIONS.md):

* **Static grids.** Scales are fixed before rounding.  They are searched with the price 1/[H⁻¹]_jj, the cost of an error
  in column j after the other columns have compensated for it.  So columns may be visited in any order, by default in
  descending H_jj ("activation order"), while groups keep their place in memory: no cost at run time.
* **One factorisation, no inverse**: `factor.py`.
* Columns whose input was always zero (H_jj = 0) are rounded to nearest, not set to zero: text unlike the calibration
  set may use them.  No other column depends on them, and the damping is their price in the search for scales.
* A row that compensation made worse under H (rounding is not convex) keeps its nearest codes.  Its loss needs no
  product: with δ = w - ŵ, the errors e = δ U⁻¹ of the loop above give  δ (H + λI) δᵀ = Σ e².

`order="natural", scales="minmax"` is the paper's own algorithm: the range of a group is taken from the partly
compensated weights, when the first column of the group is reached.

When H + λI cannot be factored, λ grows tenfold, up to a tenth of the mean diagonal.  If that fails too, the weight is
rounded to nearest on clipped ranges, and a note is reported.
"""

import torch
from torch import Tensor

from llmq.algorithms import Options, Rounding, clip, output_error
from llmq.algorithms.factor import HIGHEST_DAMPING, Factor, factorize
from llmq.numerics import affine_grid
from llmq.numerics.affine_grid import Grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import value_table
from llmq_kernels.gptq_block import op as gptq_block
from llmq_kernels.gptq_block.problem import Problem

NEEDS_FACTOR = True


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: WeightScheme, options: Options, factor: Factor | None = None
) -> Rounding:
    """See `RoundingStage`."""
    if stats is None or stats.tokens == 0:
        raise ValueError("gptq needs the statistics of at least one token")
    hessian = stats.second_moment()
    factor = factor or factorize(hessian, options.order, options.damping)
    if factor is None:
        nearest = clip.round_weight(weight, stats, scheme, options)
        tried = max(HIGHEST_DAMPING, options.damping)
        note = f"rounded to nearest: the Hessian cannot be factored, even with a damping of {tried:g}"
        return Rounding(nearest.quantized, None, (note,))
    notes = [] if factor.damping == options.damping else [f"damping raised to {factor.damping:g}"]

    if options.order == "natural" and options.scales == "minmax" and not (scheme.two_level or scheme.table):
        chosen, codes, squares = compensate_with_growing_grid(weight, factor, scheme, options.scale_dtype)
    else:
        if options.scales == "searched":
            chosen = affine_grid.fit_searched(weight, scheme, options.scale_dtype, factor.price)
        else:
            chosen = affine_grid.fit_minmax(weight, scheme, options.scale_dtype)
        codes, squares = compensate(weight, factor, chosen)
    damping = factor.damping * hessian.diagonal().mean()
    loss = squares - damping * (weight - chosen.quantized(codes).dequantize()).square().sum(1)
    codes, loss, kept = without_worse_rows(weight, chosen, codes, loss, hessian)
    if kept:
        notes.append("some rows rounded to nearest, because compensation made them worse")
    return Rounding(chosen.quantized(codes), factor.damping, tuple(notes), loss)


def compensate(weight: Tensor, factor: Factor, chosen: Grid) -> tuple[Tensor, Tensor]:
    """Codes (N, K) uint8 of `weight` (N, K) on the fixed grid `chosen`, and δ (H + λI) δᵀ of each row, (N,) float32."""
    K = weight.shape[1]
    columns = weight.T[factor.order].contiguous()  # (K, N), visiting order: a column is contiguous
    group_of = (factor.order // chosen.scheme.columns_per_group(K)).to(torch.int32)
    scales, zeros = _by_group(chosen)
    codes = gptq_block.compensate(
        Problem(
            columns[None], factor.upper[None], scales[None], zeros[None], group_of[None], chosen.scheme.levels,
            value_table(chosen.scheme),
        )
    )  # fmt: skip
    restored = torch.empty_like(codes[0])
    restored[factor.order] = codes[0]
    return restored.T.contiguous(), _squares(columns)


def _squares(errors: Tensor) -> Tensor:
    """Σ e² (N,) of errors e (K, N), in which the loop leaves the columns."""
    lengths: Tensor = torch.linalg.vector_norm(errors, dim=0)
    return lengths.square_()


def _by_group(chosen: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points (G, N) float32."""
    scales = chosen.scales.to(torch.float32).T.contiguous()
    if chosen.zeros is None:
        return scales, torch.full_like(scales, float(chosen.scheme.middle))
    return scales, chosen.zeros.to(torch.float32).T.contiguous()


def compensate_with_growing_grid(
    weight: Tensor, factor: Factor, scheme: WeightScheme, scale_dtype: affine_grid.ScaleDtype
) -> tuple[Grid, Tensor, Tensor]:
    """As in the paper: the min-max range of a group is taken once all earlier columns are compensated for.

    Returns the grid, and what `compensate` returns.

    Blocks end where groups end, so the range of a group is never taken while updates of its columns are pending.
    """
    if scheme.group_size == "tensor":  # one group, which starts with the first column
        chosen = affine_grid.fit_minmax(weight, scheme, scale_dtype)
        return chosen, *compensate(weight, factor, chosen)
    columns = weight.T.clone()  # (K, N)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    group_of = torch.zeros(1, len(columns), dtype=torch.int32, device=weight.device)  # one group at a time
    width = scheme.columns_per_group(len(columns))
    grids = []
    for start in range(0, len(columns), width):
        group = affine_grid.fit_minmax(columns[start : start + width].T.contiguous(), scheme, scale_dtype)
        scales, zeros = _by_group(group)  # (1, N) each
        problem = Problem(columns[None], factor.upper[None], scales[None], zeros[None], group_of, scheme.levels)
        gptq_block.quantize_columns(problem, codes[None], start, start + width)
        grids.append(group)
    scales = torch.cat([group.scales for group in grids], dim=1)
    offsets = [group.zeros for group in grids if group.zeros is not None]
    grid = Grid(scheme, scales, torch.cat(offsets, dim=1) if offsets else None)
    return grid, codes.T.contiguous(), _squares(columns)


def without_worse_rows(
    weight: Tensor, chosen: Grid, codes: Tensor, loss: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor, int]:
    """`codes` and their output errors `loss` (N,), with those of the nearest codes in the rows where these are lower.

    The number is the number of such rows.
    """
    nearest = chosen.encode(weight)
    nearest_loss = output_error(weight, chosen.quantized(nearest).dequantize(), hessian)
    worse = (loss > nearest_loss) & (codes != nearest).any(1)
    codes = torch.where(worse[:, None], nearest, codes)
    return codes, torch.where(worse, nearest_loss, loss), int(worse.sum())
