"""The Cholesky factor of a Hessian, shared by GPTQ, the asymmetric target and the refinements.

The Cholesky factor of H flipped in both directions gives H = RRᵀ with R upper triangular.  U = R⁻¹ is the upper
Cholesky factor of H⁻¹ = UᵀU.  So there is one factorisation, and H itself is never inverted.

When H + λI cannot be factored, λ grows tenfold, up to a tenth of the mean diagonal.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HIGHEST_DAMPING = 0.1
STRIP = 1024  # columns of the factor that are inverted at once
ELEMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Factor:
    """H⁻¹ = UᵀU of a damped Hessian.

    upper    U (K, K) float32, upper triangular, in visiting order
    price    (K,) float32, 1/[H⁻¹]_jj, in memory order
    order    (K,) int64, the column that is visited first, second, …
    damping  λ as a fraction of the mean diagonal
    """

    upper: Tensor
    price: Tensor
    order: Tensor
    damping: float


def factorize(hessian: Tensor, order: str, damping: float) -> Factor | None:
    """Factor H (K, K) float32, in float64, with as little damping as possible; None where no damping is enough.

    order    "activation" (columns with large H_jj first) or "natural"
    damping  the first value to try, as a fraction of the mean diagonal
    """
    diagonal = hessian.diagonal().to(torch.float64)
    mean = float(diagonal.mean())
    if not 0 < mean < math.inf:  # not finite, or all zero
        return None
    activation = torch.argsort(diagonal, descending=True, stable=True)
    visited = activation if order == "activation" else torch.arange(len(hessian), device=hessian.device)
    flipped = visited.flip(0)
    damped = diagonal[flipped]
    # Column-major, so that LAPACK works in place: (K, K) float64 is 1.6 GB at K = 14336, and only one copy exists.
    work = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device).T
    previous = 0.0
    while True:
        damped += (damping - previous) * mean
        work.copy_(hessian[flipped[:, None], flipped]).diagonal().copy_(damped)
        failed = torch.empty((), dtype=torch.int32, device=work.device)
        torch.linalg.cholesky_ex(work, out=(work, failed))
        if not failed:
            return _factor(work, visited, damping)
        if damping >= HIGHEST_DAMPING:
            return None
        damping, previous = min(10 * damping, HIGHEST_DAMPING), damping


def _factor(lower: Tensor, order: Tensor, damping: float) -> Factor:
    """`lower` (K, K) float64, column-major, is the Cholesky factor of the flipped H; it is overwritten."""
    _reverse(lower.T.view(-1))  # flipped in both directions, which is R: upper triangular, R Rᵀ = H
    squares = _invert_upper(lower)
    price = torch.empty_like(squares, dtype=torch.float32)
    price[order] = (1 / squares).to(torch.float32)
    # The GPU kernel reads rows of U, so they are contiguous there; on a CPU both layouts take the same time.
    layout = torch.contiguous_format if lower.is_cuda else torch.preserve_format
    return Factor(lower.to(torch.float32, memory_format=layout), price, order, damping)


def _reverse(values: Tensor) -> None:
    """Reverse `values` (n,) in place."""
    n = len(values)
    for start in range(0, n // 2, ELEMENTS_AT_ONCE):
        stop = min(start + ELEMENTS_AT_ONCE, n // 2)
        front = values[start:stop].flip(0)
        values[start:stop] = values[n - stop : n - start].flip(0)
        values[n - stop : n - start] = front


def _invert_upper(R: Tensor) -> Tensor:
    """Replace R (K, K) by its inverse; returns the squared length (K,) of each of its columns.

    It works on strips of columns, from the left.  When A is inverted already, the next strip is

        ( A  B )⁻¹     ( A⁻¹   -A⁻¹ B D⁻¹ )
        (    D )    =  (            D⁻¹   )
    """
    squares = torch.empty(len(R), dtype=R.dtype, device=R.device)
    for start in range(0, len(R), STRIP):
        stop = min(start + STRIP, len(R))
        corner = R[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=R.dtype, device=R.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        corner.copy_(inverse)
        above = R[:start, start:stop]
        above.copy_(R[:start, :start] @ (above @ inverse)).neg_()
        squares[start:stop] = R[:stop, start:stop].square().sum(0)
    return squares
