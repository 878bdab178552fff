"""The loss of a quantized weight on the validation tokens, which nothing is fitted on.

Let δ = w - ŵ and D = X - X̂, the change of the inputs by the quantized layers before.  X = X̂ + D gives

    ‖X wᵀ - X̂ ŵᵀ‖²/T  =  δ H δᵀ  +  2 w C δᵀ  +  w (DᵀD/T) wᵀ        H = X̂ᵀX̂/T,  C = DᵀX̂/T

with all three sums over the validation tokens.  Where the inputs of the float model are not known, only the first term
is computed.  A stage that does not lower this loss has overfitted to the calibration text, and its result is discarded.

w C and the last term do not depend on ŵ, so they are computed once, and a candidate ŵ costs one product.  All w + α V
together cost one too, because the loss is a parabola in α:

    w (DᵀD/T) wᵀ  -  2 α w C Vᵀ  +  α² V H Vᵀ
"""

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from llmq.algorithms import quadratic_form
from llmq.numerics.input_stats import InputStats
from llmq_kernels.full_precision import with_tf32


@dataclass(frozen=True)
class Parabola:
    """The loss of w + α V is  constant - 2 α slope + α² curvature;  (N,) float32 each, one number per row."""

    constant: Tensor
    slope: Tensor
    curvature: Tensor

    def rows(self, start: int, stop: int) -> "Parabola":
        return Parabola(self.constant[start:stop], self.slope[start:stop], self.curvature[start:stop])


class ValidationLoss:
    """The loss of weights in the place of `weight` (N, K) float32.

    judge  statistics of the validation tokens
    """

    def __init__(self, weight: Tensor, judge: InputStats) -> None:
        self._weight = weight
        self._hessian = judge.second_moment()
        self._constant: Tensor | None = None  # w (DᵀD/T) wᵀ
        self._weight_cross: Tensor | None = None  # w C
        drift = judge.drift_moment()
        if drift is not None:
            self._constant = quadratic_form(weight, drift)
        del drift  # before another (K, K) is allocated
        cross = judge.cross_moment()
        if cross is not None:
            with with_tf32() if weight.is_cuda else nullcontext():
                self._weight_cross = weight @ cross

    def of(self, rounded: Tensor) -> Tensor:
        """(N,) float32, the loss per row of `rounded` (N, K) float32."""
        difference = self._weight - rounded
        loss = quadratic_form(difference, self._hessian)
        if self._weight_cross is not None and self._constant is not None:
            loss += 2 * difference.mul_(self._weight_cross).sum(1)
            loss += self._constant
        return loss

    def along(self, step: Tensor) -> Parabola | None:
        """The loss along `step` V (N, K) float32; None where the inputs of the float model are not known."""
        if self._weight_cross is None or self._constant is None:
            return None
        curvature = quadratic_form(step, self._hessian)
        return Parabola(self._constant, (self._weight_cross * step).sum(1), curvature)
