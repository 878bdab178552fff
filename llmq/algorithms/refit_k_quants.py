"""Refit a two-level grid with fixed codes: its integers one by one, then its real numbers by least squares.

A row of Q4_K is  ŵ = Σ_i sc_i (d q_i) - m_i (dmin 1_i)  over its sub-blocks i, with q the codes (quantized values).  It
is linear in each sc and m.  So, as for a code in `descent.py`, the best integer step of one of them, with all others
fixed, has a closed form:

    a = round(g uᵀ / u H uᵀ)        u = d q_i  or  u = -dmin 1_i,   g = (w* - ŵ) H,   then  g -= a u H

It is also linear in all d and dmin of a row together.  These are solved for like the scales in `refit.py`:

    s = (b + μ D s⁰) (A + μ diag D)⁻¹        A = B H Bᵀ (P, P),  b = w* H Bᵀ

with a row of B for each d (sc q, zero outside of its superblock) and each dmin (-m), P = 2 K / 256.  They are rounded
to float16 before the loss is computed.  A row is accepted only where its loss falls, after both of the steps.
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
    """`after` in the rows where its loss is lower, `before` in the others."""
    loss, old = (output_error(target, tensor.dequantize(), hessian) for tensor in (after, before))
    return where((loss < old)[:, None], after, before)


def _with_other_integers(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """One pass over the sub-blocks: first the sc and then the m of each."""
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
    """(N,) integers: how many steps along a direction (N, g) lower the loss most.

    gradient  (N, g), of the columns of the direction
    inside    H (g, g) of the same columns
    """
    curvature = (direction @ inside).mul_(direction).sum(1)
    return torch.nan_to_num((gradient * direction).sum(1) / curvature, 0.0, 0.0, 0.0).round_()


def _kept(values: Tensor, before: Tensor, *, signed: bool) -> Tensor:
    """sc clamped to the range of the file; unchanged where it would become zero."""
    lowest, highest = (LOWEST_SIGNED, LARGEST_SIGNED) if signed else (1, LARGEST)
    clamped = values.clamp(lowest, highest)
    return torch.where(clamped == 0, before, clamped)


def _with_other_shared(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """d and dmin by least squares, those of a row together."""
    K, P = quantized.shape[1], _parts(quantized).shared().shape[1]
    rows = max(1, ELEMENTS_AT_ONCE // max(P * P, 2 * K))
    pieces = []
    for start in range(0, len(target), rows):
        rows_of_target, part = target[start : start + rows], quantized.rows(start, start + rows)
        pieces.append(_solved(rows_of_target, part, hessian))
    other = _parts(quantized).with_shared(torch.cat(pieces))
    return QuantizedTensor.of_superblocks(quantized.codes, other, quantized.scheme)


def _solved(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """New d and dmin, (N, P) float32; the old number where there is no solution above zero."""
    grid, groups = _parts(quantized), quantized.column_groups()
    old = grid.shared()  # (N, P)
    bases = [_steps(quantized) * grid.sc.to(torch.float32)[:, groups]]  # (N, K) each
    if grid.m is not None:
        bases.append(-grid.m.to(torch.float32)[:, groups])
    A, b = _normal_equations(bases, target, hessian)
    fitted = ridge.solve(A, b, old)  # the old number where every code, or every m, is zero
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
    """(N, K) float32: the factor of a scale, which is the code or, in a symmetric grid, code - middle."""
    codes = quantized.codes.to(torch.float32)
    return codes - quantized.scheme.middle if quantized.scheme.symmetric else codes


def _parts(quantized: QuantizedTensor) -> Superblocks:
    assert quantized.superblocks is not None, "only two-level grids have parts to refit"
    return quantized.superblocks
