"""The asymmetric target: round not w, but what makes up for the layers that were rounded before.

A weight is fed X̂ by the rounded layers before it, where the float model would feed it X.  Its output should be X wᵀ
nevertheless, and the float weight that comes closest to that is

    argmin_w*  ‖X wᵀ - X̂ w*ᵀ‖²/T  =  w + w C H⁻¹        H = X̂ᵀX̂/T,  C = (X - X̂)ᵀX̂/T

of which a part is taken: w* = w + α w C H⁻¹.  α = 1 is the limit of Qronos (Zhang et al. 2025, arXiv:2505.11695) and
of QEP (Arai and Ichikawa 2025, arXiv:2504.09629); GPTAQ (Li et al. 2025, arXiv:2504.02692) takes the same step column
by column.  H⁻¹ = UᵀU, damped, is the factor that rounding needs anyway.

With V = w C H⁻¹ the loss is a parabola in α, up to what no α changes: α² V H Vᵀ - 2 α w C Vᵀ.  α is chosen by it on
tokens that neither C nor H has seen, with 0 among the choices; where none are held out, the largest one is taken.  A
step longer than half the weight is never taken: it would be fitted to noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms import output_error
from llmq.algorithms.factor import Factor
from llmq.numerics.input_stats import InputStats

LONGEST_STEP = 0.5  # of ‖w‖


@dataclass(frozen=True)
class Target:
    """What to round instead of a weight: w* (N, K) float32.

    `before` and `after` are ‖X wᵀ - X̂ wᵀ‖²/T and ‖X wᵀ - X̂ w*ᵀ‖²/T over the held-out tokens; None where there are
    none.
    """

    weight: Tensor
    alpha: float
    before: float | None = None
    after: float | None = None
    notes: tuple[str, ...] = ()


def step(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """V = w C H⁻¹ for `weight` (N, K) and `cross` C (K, K), all float32."""
    visited = (weight @ cross)[:, factor.order] @ factor.upper.T @ factor.upper
    V = torch.empty_like(visited)
    V[:, factor.order] = visited
    return V


def choose(weight: Tensor, V: Tensor, alphas: Sequence[float], judge: InputStats | None) -> Target:
    """The target of `weight` (N, K) along its step V, with the best of `alphas` on the statistics of `judge`."""
    length, allowed = float(V.norm()), LONGEST_STEP * float(weight.norm())
    possible = [alpha for alpha in alphas if math.isfinite(length) and alpha * length <= allowed]
    notes = () if possible else ("the target is left out, it is further than half the weight away",)
    cross = None if judge is None else judge.cross_moment()
    drift = None if judge is None else judge.drift_moment()
    if judge is None or cross is None or drift is None:
        alpha = max(possible, default=0.0)
        return Target(weight + alpha * V if alpha else weight, alpha, notes=notes)
    curvature = float(output_error(V, torch.zeros_like(V), judge.second_moment()).double().sum())
    slope = float((weight @ cross).mul_(V).sum(dtype=torch.float64))
    before = float((weight @ drift).mul_(weight).sum(dtype=torch.float64))
    change = {alpha: alpha**2 * curvature - 2 * alpha * slope for alpha in possible}
    alpha = min(possible, key=lambda each: change[each], default=0.0)
    if not change.get(alpha, 0.0) < 0:
        return Target(weight, 0.0, before, before, notes)
    return Target(weight + alpha * V, alpha, before, before + change[alpha], notes)
