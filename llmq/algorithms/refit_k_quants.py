"""Refit a two-level grid with fixed codes: its integers one by one, then its real numbers by least squares.

A row of Q4_K is  ŵ = Σ_i sc_i (d q_i) - m_i (dmin 1_i)  over its sub-blocks i, with q the codes (quantized values).  It
is linear in each sc and m.  So, as for a code in `descent.py`, the best integer step of one of them, with all others
fixed, has a closed form:

    a = round(g uᵀ / u H uᵀ)        u = d q_i  or  u = -dmin 1_i,   g = δ H,  δ = w* - ŵ,   then  g -= a u H

It is also linear in all d and dmin of a row together.  These are solved for like the scales in `refit.py`:

    t = g Bᵀ (A + μ diag D)⁻¹        A = B H Bᵀ (P, P),  t the change of all d and dmin

with a row of B for each d (sc q, zero outside of its superblock) and each dmin (-m), P = 2 K / 256.  They are rounded
to float16 before the change of the loss is computed.  A row is accepted only where its loss falls, after both of the
steps.  The first product gives g, which all losses follow from: g is kept up to date, and the loss is g δᵀ.  In Q4_1
and IQ4_NL a superblock is one sub-block, and its integers are always 1.
"""

import torch
from torch import Tensor

from llmq.algorithms import Options, ridge
from llmq.numerics.k_quant_grid import largest_integer
from llmq.numerics.quantized_tensor import QuantizedTensor, Superblocks, where
from llmq.numerics.value_table import value_table

ELEMENTS_AT_ONCE = 1 << 24  # of the systems (P, P) and of the products (K,) of the rows that are solved together


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`; `quantized` is on a two-level grid."""
    difference = target - quantized.dequantize()
    gradient, grid = difference @ hessian, _parts(quantized)  # (N, K)
    if grid.sc.shape == grid.d.shape:
        return _with_other_shared(quantized, gradient, hessian)
    moved, moved_gradient = _with_other_integers(quantized, gradient, hessian)
    moved_difference = target - moved.dequantize()
    lower = _loss(moved_gradient, moved_difference) < _loss(gradient, difference)
    moved = where(lower[:, None], moved, quantized)
    gradient = torch.where(lower[:, None], moved_gradient, gradient)
    return _with_other_shared(moved, gradient, hessian)


def _loss(gradient: Tensor, difference: Tensor) -> Tensor:
    """(N,): δ H δᵀ from δ H and δ (N, K)."""
    return (gradient * difference).sum(1)


def _with_other_integers(
    quantized: QuantizedTensor, gradient: Tensor, hessian: Tensor
) -> tuple[QuantizedTensor, Tensor]:
    """One pass over the sub-blocks: first the sc and then the m of each.  Returns the gradient after it, too."""
    grid, codes = _parts(quantized), _steps(quantized)
    width = quantized.scheme.columns_per_group(codes.shape[1])
    per_superblock, largest = grid.sc.shape[1] // grid.d.shape[1], largest_integer(quantized.scheme)
    d = grid.d.to(torch.float32)
    sc, m = grid.sc.to(torch.float32), None if grid.m is None else grid.m.to(torch.float32)
    gradient = gradient.clone()
    for group in range(sc.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        inside, near = hessian[columns, columns], gradient[:, columns].clone()
        direction = d[:, group // per_superblock, None] * codes[:, columns]  # (N, g)
        step = _best_step(direction, near, inside)
        stepped = _kept(sc[:, group] + step, sc[:, group], -largest - 1 if m is None else 1, largest)
        move = direction * (stepped - sc[:, group])[:, None]
        sc[:, group] = stepped
        if m is not None and grid.dmin is not None:
            near -= move @ inside
            direction = -grid.dmin.to(torch.float32)[:, group // per_superblock, None].expand_as(move)
            stepped = (m[:, group] + _best_step(direction, near, inside)).clamp_(0, largest)
            move += direction * (stepped - m[:, group])[:, None]
            m[:, group] = stepped
        gradient -= move @ hessian[columns]
    other = Superblocks(grid.d, sc.to(grid.sc.dtype), grid.dmin, None if m is None else m.to(torch.uint8))
    return QuantizedTensor.of_superblocks(quantized.codes, other, quantized.scheme), gradient


def _best_step(direction: Tensor, gradient: Tensor, inside: Tensor) -> Tensor:
    """(N,) integers: how many steps along a direction (N, g) lower the loss most.

    gradient  (N, g), of the columns of the direction
    inside    H (g, g) of the same columns
    """
    curvature = (direction @ inside).mul_(direction).sum(1)
    return torch.nan_to_num((gradient * direction).sum(1) / curvature, 0.0, 0.0, 0.0).round_()


def _kept(values: Tensor, before: Tensor, lowest: int, largest: int) -> Tensor:
    """sc clamped to the range of the file; unchanged where it would become zero."""
    clamped = values.clamp(lowest, largest)
    return torch.where(clamped == 0, before, clamped)


def _with_other_shared(quantized: QuantizedTensor, gradient: Tensor, hessian: Tensor) -> QuantizedTensor:
    """d and dmin by least squares, those of a row together, in the rows where this lowers the loss."""
    K, P = quantized.shape[1], _parts(quantized).shared().shape[1]
    rows = max(1, ELEMENTS_AT_ONCE // max(P * P, 2 * K))
    pieces = []
    for start in range(0, len(gradient), rows):
        part = quantized.rows(start, start + rows)
        pieces.append(_solved(part, gradient[start : start + rows], hessian))
    other = _parts(quantized).with_shared(torch.cat(pieces))
    return QuantizedTensor.of_superblocks(quantized.codes, other, quantized.scheme)


def _solved(quantized: QuantizedTensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """New d and dmin, (N, P) float32, of float16 precision; the old number where no solution has the same sign."""
    grid, groups = _parts(quantized), quantized.column_groups()
    old = grid.shared()  # (N, P)
    bases = [_steps(quantized) * grid.sc.to(torch.float32)[:, groups]]  # (N, K) each
    if grid.m is not None:
        bases.append(-grid.m.to(torch.float32)[:, groups])
    A, r = _normal_equations(bases, gradient, hessian, grid.d.shape[1])
    fitted = old + ridge.solve(A, r)  # the old number where every code, or every m, is zero
    fitted = torch.where(torch.isfinite(fitted) & (fitted * old > 0), fitted, old)
    fitted = grid.with_shared(fitted).shared()
    return torch.where((ridge.change(A, r, fitted - old) < 0)[:, None], fitted, old)


def _normal_equations(bases: list[Tensor], gradient: Tensor, hessian: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """A = B H Bᵀ (N, P, P) and r = g Bᵀ (N, P), with S superblocks per row."""
    N, K = gradient.shape
    width = K // S

    def by_superblock(values: Tensor) -> Tensor:
        return torch.cat([(values * basis).reshape(N, S, width).sum(2) for basis in bases], dim=1)

    A = torch.empty(N, len(bases) * S, len(bases) * S, device=gradient.device)
    for number, basis in enumerate(bases):
        for block in range(S):
            inside = slice(block * width, (block + 1) * width)
            A[:, number * S + block] = by_superblock(basis[:, inside] @ hessian[inside])
    return A, by_superblock(gradient)


def _steps(quantized: QuantizedTensor) -> Tensor:
    """(N, K) float32: the factor of a scale: the code, or code - middle in a symmetric grid, or a value of a table."""
    if (table := value_table(quantized.scheme)) is not None:
        return table.values(quantized.codes)
    codes = quantized.codes.to(torch.float32)
    return codes - quantized.scheme.middle if quantized.scheme.symmetric else codes


def _parts(quantized: QuantizedTensor) -> Superblocks:
    assert quantized.superblocks is not None, "only two-level grids have parts to refit"
    return quantized.superblocks
