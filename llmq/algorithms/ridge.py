"""Ridge regression towards the old values: one small least-squares system per row of a weight.

In the change d = s - s⁰ of the values, with r the gradient at the old values (a loss of d A dᵀ - 2 r dᵀ, up to a
constant):

    argmin_d  d A dᵀ - 2 r dᵀ + μ Σ_g D_g d_g²        D = diag(A)

    d = r (A + μ diag D)⁻¹

The system is scaled so that A + μ diag D has the diagonal 1 + μ; then float32 is enough.  A number on which nothing
depends (D_g = 0) does not change.
"""

import torch
from torch import Tensor

RIDGE = 1e-3  # μ


def solve(A: Tensor, r: Tensor) -> Tensor:
    """d (N, G) from A (N, G, G) and r (N, G), all float32.

    Entries are not finite where there is no solution.
    """
    D = A.diagonal(dim1=1, dim2=2)  # (N, G)
    root = torch.where(D > 0, D, 1).sqrt()
    scaled = A / (root[:, :, None] * root[:, None, :])
    scaled.diagonal(dim1=1, dim2=2).add_(RIDGE).add_(D <= 0)
    solution: Tensor = torch.linalg.solve_ex(scaled, r / root).result
    return torch.where(D > 0, solution / root, 0)


def change(A: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """(N,) float32: by how much a step d (N, G) changes the loss of each row."""
    return ((d[:, None] @ A)[:, 0] - 2 * r).mul_(d).sum(1)
