"""GPTQ: round one column at a time and let the columns to come make up for the error.

Frantar et al. 2022 (arXiv:2210.17323).  With H = XᵀX/T + λI and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), for
each column j in order

    e = (w_j - ŵ_j) / U_jj        w_{j:} -= e · U_{j,j:}

Rows are independent.  Columns go in blocks of 128: inside a block the update is applied at once, behind it by one
matrix product a block.  What differs from the paper, each measured better (docs/DECISIONS.md):

* **Static grids.** Scales are fixed before rounding, searched with the price 1/[H⁻¹]_jj that an error in column j has
  after the others have made up for it.  So columns may be visited in any order, and are by default in descending
  H_jj ("activation order"), while groups stay where they are in memory: nothing to pay at run time.
* **One factorisation, no inverse.** Flipped in both directions, the Cholesky factor of H gives H = RRᵀ with R upper
  triangular, and U = R⁻¹.
* Columns that never saw an input (H_jj = 0) are rounded to nearest, not zeroed: text unlike the calibration set may
  use them.  Nothing couples to them, and the damping is their price in the search for scales.
* A row that compensation made worse under H (rounding is not convex) keeps its nearest codes.

`order="natural", scales="minmax"` is the paper's own algorithm: each group's range is taken from the weights as
compensated so far, when its first column is reached.

When H + λI cannot be factored λ grows tenfold, up to a tenth of the mean diagonal; then the weight is rounded to
nearest on clipped ranges, and the report says so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq import grid
from llmq.algorithms import Options, Rounding, clip, output_error
from llmq.config import Scheme
from llmq.grid import Grid
from llmq.stats import InputStats

BLOCK = 128
HIGHEST_DAMPING = 0.1


@dataclass(frozen=True)
class Factor:
    """U (K, K) float32 upper triangular in visiting order; price (K,) = 1/[H⁻¹]_jj and order (K,) in memory order."""

    upper: Tensor
    price: Tensor
    order: Tensor
    damping: float


def round_weight(weight: Tensor, stats: InputStats | None, scheme: Scheme, options: Options) -> Rounding:
    """See `RoundingStage`."""
    if stats is None or stats.tokens == 0:
        raise ValueError("gptq needs the statistics of at least one token")
    hessian = stats.hessian
    factor = factorize(hessian, options)
    if factor is None:
        nearest = clip.round_weight(weight, stats, scheme, options)
        tried = max(HIGHEST_DAMPING, options.damping)
        note = f"rounded to nearest: its Hessian cannot be factored, even with a damping of {tried:g}"
        return Rounding(nearest.quantized, None, (note,))
    notes = [] if factor.damping == options.damping else [f"damping raised to {factor.damping:g}"]

    if options.order == "natural" and options.scales == "minmax":
        chosen, codes = compensate_with_growing_grid(weight, factor, scheme, options.scale_dtype)
    else:
        if options.scales == "searched":
            chosen = grid.fit_searched(weight, scheme, options.scale_dtype, factor.price)
        else:
            chosen = grid.fit_minmax(weight, scheme, options.scale_dtype)
        codes = compensate(weight, factor, chosen)
    codes, kept = without_worse_rows(weight, chosen, codes, hessian)
    if kept:
        notes.append("some rows rounded to nearest, compensation made them worse")
    return Rounding(chosen.quantized(codes), factor.damping, tuple(notes))


def factorize(hessian: Tensor, options: Options) -> Factor | None:
    """Factor H (K, K) float32, in float64, with as little damping as it takes; None where none is enough."""
    H = hessian.to(torch.float64)
    diagonal = H.diagonal().clone()
    mean = float(diagonal.mean())
    if not mean > 0 or not torch.isfinite(diagonal).all():
        return None
    activation = torch.argsort(diagonal, descending=True, stable=True)
    order = activation if options.order == "activation" else torch.arange(len(H), device=H.device)
    H = H[order][:, order]
    damping, previous = options.damping, 0.0
    while True:
        H.diagonal().add_((damping - previous) * mean)
        lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            return _factor(lower, order, damping)
        if damping >= HIGHEST_DAMPING:
            return None
        damping, previous = min(10 * damping, HIGHEST_DAMPING), damping


def _factor(flipped: Tensor, order: Tensor, damping: float) -> Factor:
    R = flipped.flip(0, 1)  # upper triangular, R Rᵀ = H
    upper = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    price = torch.empty(len(R), dtype=torch.float32, device=R.device)
    price[order] = (1 / upper.square().sum(0)).to(torch.float32)
    return Factor(upper.to(torch.float32), price, order, damping)


def compensate(weight: Tensor, factor: Factor, chosen: Grid) -> Tensor:
    """Codes (N, K) uint8 of `weight` (N, K) on a grid that is fixed."""
    scales, zeros = (part.T[factor.order].contiguous() for part in chosen.by_column(weight.shape[1]))  # (K, N) each
    columns = weight.T[factor.order].contiguous()  # (K, N), visiting order: a column is contiguous
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(columns), BLOCK):
        _compensate_block(columns, codes, factor.upper, start, start + BLOCK, scales, zeros, chosen.scheme.levels)
    restored = torch.empty_like(codes)
    restored[factor.order] = codes
    return restored.T.contiguous()


def compensate_with_growing_grid(
    weight: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Grid, Tensor]:
    """The paper's order: a group's min-max range is taken once the columns before it are compensated for.

    Blocks end where groups end, so a group is never judged while updates to its tail are still pending.
    """
    if scheme.group_size == "tensor":  # one group, from the first column on
        chosen = grid.fit_minmax(weight, scheme, scale_dtype)
        return chosen, compensate(weight, factor, chosen)
    columns = weight.T.clone()  # (K, N)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    width = scheme.columns_per_group(len(columns))
    grids = []
    for start in range(0, len(columns), width):
        group = grid.fit_minmax(columns[start : start + width].T.contiguous(), scheme, scale_dtype)
        scales, zeros = (
            part.T.expand(len(columns), -1) for part in group.by_column(1)
        )  # one group: any row is its row
        _compensate_block(columns, codes, factor.upper, start, start + width, scales, zeros, scheme.levels)
        grids.append(group)
    scales = torch.cat([group.scales for group in grids], dim=1)
    offsets = [group.zeros for group in grids if group.zeros is not None]
    return Grid(scheme, scales, torch.cat(offsets, dim=1) if offsets else None), codes.T.contiguous()


def _compensate_block(
    columns: Tensor, codes: Tensor, upper: Tensor, start: int, stop: int, scales: Tensor, zeros: Tensor, levels: int
) -> None:
    """Round columns start..stop of `columns` (K, N) into `codes`, in place, and update all that follow."""
    block = columns[start:stop]  # (B, N), a view
    U = upper[start:stop, start:stop]
    errors = torch.empty_like(block)
    pivots = U.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        scale, zero = scales[start + i], zeros[start + i]
        code = (block[i] / scale).add_(zero).round_().clamp_(0, levels)
        codes[start + i] = code
        torch.sub(block[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(pivot)
        block[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1)
    columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)


def without_worse_rows(weight: Tensor, chosen: Grid, codes: Tensor, hessian: Tensor) -> tuple[Tensor, int]:
    """`codes`, with nearest ones in the rows whose output error they lower; and how many rows those are."""
    nearest = chosen.encode(weight)
    loss = output_error(weight, chosen.quantized(codes).dequantize(), hessian)
    nearest_loss = output_error(weight, chosen.quantized(nearest).dequantize(), hessian)
    worse = loss > nearest_loss
    return torch.where(worse[:, None], nearest, codes), int(worse.sum())
