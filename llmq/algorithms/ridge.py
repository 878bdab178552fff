"""Ridge regression towards the old values: one small least-squares system per row of a weight.

    argmin_s  s A sᵀ - 2 b sᵀ + μ Σ_g D_g (s_g - s⁰_g)²        D = diag(A)

    s = (b + μ D s⁰) (A + μ diag D)⁻¹

The system is scaled so that A + μ diag D has the diagonal 1 + μ; then float32 is enough.  A number on which nothing
depends (D_g = 0) keeps its old value s⁰_g.
"""

import torch
from torch import Tensor

RIDGE = 1e-3  # μ


def solve(A: Tensor, b: Tensor, old: Tensor) -> Tensor:
    """s (N, G) from A (N, G, G), b (N, G) and s⁰ `old` (N, G), all float32; A and b are overwritten.

    Entries are not finite where there is no solution.
    """
    D = A.diagonal(dim1=1, dim2=2).clone()  # (N, G)
    unused = D <= 0
    D[unused] = 1
    A.diagonal(dim1=1, dim2=2).add_(RIDGE * D + unused)
    b += RIDGE * D * old + unused * old
    root = D.sqrt()
    scaled = A / (root[:, :, None] * root[:, None, :])
    solution: Tensor = torch.linalg.solve_ex(scaled, b / root).result
    return solution / root
