"""Refit a two-level grid: with the codes fixed, its integers one by one and then its real numbers by least squares.

A row of Q4_K is  ŵ = Σ_i sc_i (d q_i) - m_i (dmin 1_i)  over its sub-blocks i: linear in each sc and m, so that, as for
a code in `descent.py`, the best step of one of them with all others fixed is a whole number that is known at once:

    a = round(g uᵀ / u H uᵀ)        u = d q_i  or  u = -dmin 1_i,   g = (w* - ŵ) H,   then  g -= a u H

It is linear in all d and dmin of a row together too, and these are solved for as scales are in `refit.py`:

    s = (b + μ D s⁰) (A + μ diag D)⁻¹        A = B H Bᵀ (P, P),  b = w* H Bᵀ

with a row of B for each d (sc q, zero outside of its superblock) and each dmin (-m), P = 2 K / 256.  They are rounded
to float16 before a row is judged.  A row is accepted only where its loss falls, after each of the two steps.
"""

import torch
from torch import Tensor

from llmq.algorithms import Options, output_error, ridge
from llmq.numerics.gguf_types import SUPERBLOCK
from llmq.numerics.k_quant_grid import LARGEST, LARGEST_SIGNED, LOWEST_SIGNED
from llmq.numerics.quantized_tensor import QuantizedTensor, Superblocks, where

ELEMENTS_AT_ONCE = 1 << 24  # of the systems (P, P) and of the products (K,) of the rows that are solved together


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`; `quantized` is on a two-level grid."""
    moved = _better(target, quantized, _with_other_integers(target, quantized, hessian), hessian)
    return _better(target, moved, _with_other_shared(target, moved, hessian), hessian)


def _better(target: Tensor, before: QuantizedTensor, after: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Row by row, what has the lower loss."""
    loss, old = (output_error(target, each.dequantize(), hessian) for each in (after, before))
    return where((loss < old)[:, None], after, before)


def _with_other_integers(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """One pass over the sub-blocks, in each first sc and then m."""
    grid, codes = _parts(quantized), _steps(quantized)
    width = quantized.scheme.columns_per_group(codes.shape[1])
    per_superblock = SUPERBLOCK // width
    d = grid.d.to(torch.float32)
    sc, m = grid.sc.to(torch.float32), None if grid.m is None else grid.m.to(torch.float32)
    gradient = (target - quantized.dequantize()) @ hessian  # (N, K)
    for group in range(sc.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        inside, near = hessian[columns, columns], gradient[:, columns].clone()
        direction = d[:, group // per_superblock, None] * codes[:, columns]  # (N, g)
        step = _best_step(direction, near, inside)
        stepped = _kept(sc[:, group] + step, sc[:, group], signed=m is None)
        move = direction * (stepped - sc[:, group])[:, None]
        sc[:, group] = stepped
        if m is not None and grid.dmin is not None:
            near -= move @ inside
            direction = -grid.dmin.to(torch.float32)[:, group // per_superblock, None].expand_as(move)
            stepped = (m[:, group] + _best_step(direction, near, inside)).clamp_(0, LARGEST)
            move += direction * (stepped - m[:, group])[:, None]
            m[:, group] = stepped
        gradient -= move @ hessian[columns]
    other = Superblocks(grid.d, sc.to(grid.sc.dtype), grid.dmin, None if m is None else m.to(torch.uint8))
    return QuantizedTensor.of_superblocks(quantized.codes, other, quantized.scheme)


def _best_step(direction: Tensor, gradient: Tensor, inside: Tensor) -> Tensor:
    """(N,) whole numbers: how often to take a direction (N, g) down the gradient (N, g), H (g, g) being `inside`."""
    curvature = (direction @ inside).mul_(direction).sum(1)
    return torch.nan_to_num((gradient * direction).sum(1) / curvature, 0.0, 0.0, 0.0).round_()


def _kept(values: Tensor, before: Tensor, *, signed: bool) -> Tensor:
    """sc within what the file holds; where it would be zero, as it was."""
    lowest, highest = (LOWEST_SIGNED, LARGEST_SIGNED) if signed else (1, LARGEST)
    clamped = values.clamp(lowest, highest)
    return torch.where(clamped == 0, before, clamped)


def _with_other_shared(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """d and dmin by least squares, all of a row together."""
    K, P = quantized.shape[1], _parts(quantized).shared().shape[1]
    rows = max(1, ELEMENTS_AT_ONCE // max(P * P, 2 * K))
    pieces = []
    for start in range(0, len(target), rows):
        some, part = target[start : start + rows], quantized.rows(start, start + rows)
        pieces.append(_solved(some, part, hessian))
    other = _parts(quantized).with_shared(torch.cat(pieces))
    return QuantizedTensor.of_superblocks(quantized.codes, other, quantized.scheme)


def _solved(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """(N, P) float32; where there is no solution, or not one above zero, what was there."""
    grid, groups = _parts(quantized), quantized.column_groups()
    old = grid.shared()  # (N, P)
    bases = [_steps(quantized) * grid.sc.to(torch.float32)[:, groups]]  # (N, K) each
    if grid.m is not None:
        bases.append(-grid.m.to(torch.float32)[:, groups])
    A, b = _normal_equations(bases, target, hessian)
    fitted = ridge.solve(A, b, old)  # where every code, or every m, is zero, the old number
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, old)


def _normal_equations(bases: list[Tensor], target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A = B H Bᵀ (N, P, P) and b = w* H Bᵀ (N, P)."""
    N, K = target.shape
    S = K // SUPERBLOCK

    def by_superblock(values: Tensor) -> Tensor:
        return torch.cat([(values * basis).reshape(N, S, SUPERBLOCK).sum(2) for basis in bases], dim=1)

    A = torch.empty(N, len(bases) * S, len(bases) * S, device=target.device)
    for number, basis in enumerate(bases):
        for block in range(S):
            inside = slice(block * SUPERBLOCK, (block + 1) * SUPERBLOCK)
            A[:, number * S + block] = by_superblock(basis[:, inside] @ hessian[inside])
    return A, by_superblock(target @ hessian)


def _steps(quantized: QuantizedTensor) -> Tensor:
    """(N, K) float32: what a scale is multiplied with."""
    codes = quantized.codes.to(torch.float32)
    return codes - quantized.scheme.middle if quantized.scheme.symmetric else codes


def _parts(quantized: QuantizedTensor) -> Superblocks:
    assert quantized.superblocks is not None, "only two-level grids have parts to refit"
    return quantized.superblocks
