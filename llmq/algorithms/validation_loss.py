"""The loss of a quantized weight on the validation tokens, which nothing is fitted on.

Let δ = w - ŵ and D = X - X̂, the change of the inputs by the quantized layers before.  X = X̂ + D gives

    ‖X wᵀ - X̂ ŵᵀ‖²/T  =  δ H δᵀ  +  2 w C δᵀ  +  w (DᵀD/T) wᵀ        H = X̂ᵀX̂/T,  C = DᵀX̂/T

with all three sums over the validation tokens.  Where the inputs of the float model are not known, only the first term
is computed.  A stage that does not lower this loss has overfitted to the calibration text, and its result is discarded.
"""

from torch import Tensor

from llmq.algorithms import output_error
from llmq.numerics.input_stats import InputStats


def validation_loss(weight: Tensor, rounded: Tensor, judge: InputStats) -> Tensor:
    """(N,) float32, the loss per row of `rounded` (N, K) in the place of `weight` (N, K), both float32.

    judge  statistics of the validation tokens
    """
    loss = output_error(weight, rounded, judge.second_moment())
    cross, drift = judge.cross_moment(), judge.drift_moment()
    if cross is not None and drift is not None:
        loss += 2 * (weight @ cross).mul_(weight - rounded).sum(1)
        loss += (weight @ drift).mul_(weight).sum(1)
    return loss
