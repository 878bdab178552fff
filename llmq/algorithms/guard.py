"""What a rounded weight costs on tokens that nothing was fitted on.

With δ = w - ŵ and D = X - X̂, what the rounded layers before have moved the inputs by, X = X̂ + D gives

    ‖X wᵀ - X̂ ŵᵀ‖²/T  =  δ H δᵀ  +  2 w C δᵀ  +  w (DᵀD/T) wᵀ        H = X̂ᵀX̂/T,  C = DᵀX̂/T

all three over the held-out tokens.  Where the float model's inputs are not known, only the first term is.  A stage that
does not lower it has learnt the calibration text by heart, and is undone.
"""

from torch import Tensor

from llmq.algorithms import output_error
from llmq.numerics.input_stats import InputStats


def held_out_loss(weight: Tensor, rounded: Tensor, judge: InputStats) -> Tensor:
    """(N,) float32, the loss of each row of `weight` (N, K) that became `rounded` (N, K), both float32.

    judge  the statistics of the held-out tokens
    """
    loss = output_error(weight, rounded, judge.second_moment())
    cross, drift = judge.cross_moment(), judge.drift_moment()
    if cross is not None and drift is not None:
        loss += 2 * (weight @ cross).mul_(weight - rounded).sum(1)
        loss += (weight @ drift).mul_(weight).sum(1)
    return loss
