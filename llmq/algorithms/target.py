"""The asymmetric target: instead of w, quantize a weight that compensates for the layers quantized before.

The quantized layers before a weight give it the inputs X̂; in the float model they are X.  Its output should still be
X wᵀ.  The float weight that comes closest to that is

    argmin_w*  ‖X wᵀ - X̂ w*ᵀ‖²/T  =  w + w C H⁻¹        H = X̂ᵀX̂/T,  C = (X - X̂)ᵀX̂/T

Only a part of that step is taken: w* = w + α w C H⁻¹.  α = 1 is the limit of Qronos (Zhang et al. 2025,
arXiv:2505.11695) and of QEP (Arai and Ichikawa 2025, arXiv:2504.09629); GPTAQ (Li et al. 2025, arXiv:2504.02692) takes
the same step column by column.  The damped H⁻¹ = UᵀU is the factor that GPTQ needs anyway.

With V = w C H⁻¹ the loss is a parabola in α (`validation_loss.py`).  α is the candidate with the lowest loss on the
validation tokens, which are in neither C nor H; 0 is one of the candidates.  Without validation
tokens the largest candidate is taken.  A step longer than half the weight is never taken, as it would be fitted to
noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms.factor import Factor
from llmq.algorithms.validation_loss import Parabola
from llmq.distributed.ranks import ALONE, Total

LONGEST_STEP = 0.5  # of ‖w‖
STRIP = 1024  # columns of a product with a triangle at once


@dataclass(frozen=True)
class Target:
    """The weight to quantize instead of w: w* (N, K) float32.

    `before` and `after` are ‖X wᵀ - X̂ wᵀ‖²/T and ‖X wᵀ - X̂ w*ᵀ‖²/T over the validation tokens; None where there are
    no such tokens.
    """

    weight: Tensor
    alpha: float
    before: float | None = None
    after: float | None = None
    notes: tuple[str, ...] = ()


def step(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """V = w C H⁻¹ for `weight` (N, K) and `cross` C (K, K), all float32."""
    visited = (weight @ cross)[:, factor.order]
    solved = times_upper(times_upper(visited, factor.upper, transposed=True), factor.upper)
    V = torch.empty_like(solved)
    V[:, factor.order] = solved
    return V


def times_upper(rows: Tensor, upper: Tensor, *, transposed: bool = False) -> Tensor:
    """A U or A Uᵀ of `rows` A (N, K) and an upper triangular U (K, K), by strips: about half of a full product."""
    product = torch.empty_like(rows)
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        if transposed:
            torch.mm(rows[:, start:], upper[start:stop, start:].T, out=product[:, start:stop])
        else:
            torch.mm(rows[:, :stop], upper[:stop, start:stop], out=product[:, start:stop])
    return product


def choose(
    weight: Tensor, V: Tensor, alphas: Sequence[float], loss: Parabola | None, total: Total = ALONE.total
) -> Target:
    """The target of `weight` (N, K) along its step V, with the best of `alphas`.

    loss   the validation loss along V, of each row; None if there are no validation tokens
    total  adds sums over rows to those of the ranks that have the other rows of the weight
    """
    squares = total(*(float(matrix.norm()) ** 2 for matrix in (V, weight)))
    length, allowed = math.sqrt(squares[0]), LONGEST_STEP * math.sqrt(squares[1])
    possible = [alpha for alpha in alphas if math.isfinite(length) and alpha * length <= allowed]
    notes = (
        () if possible else ("no asymmetric target: it differs from the weight by more than half of the weight's norm",)
    )
    if loss is None:
        alpha = max(possible, default=0.0)
        return Target(weight + alpha * V if alpha else weight, alpha, notes=notes)
    before, slope, curvature = total(
        *(float(part.sum(dtype=torch.float64)) for part in (loss.constant, loss.slope, loss.curvature))
    )
    change = {alpha: alpha**2 * curvature - 2 * alpha * slope for alpha in possible}
    alpha = min(possible, key=lambda candidate: change[candidate], default=0.0)
    if not change.get(alpha, 0.0) < 0:
        return Target(weight, 0.0, before, before, notes)
    return Target(weight + alpha * V, alpha, before, before + change[alpha], notes)
