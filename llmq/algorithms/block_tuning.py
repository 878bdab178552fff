"""Tune the codes and scales of all weights of a block together, against what the float block puts out.

Rounding layer by layer knows nothing of what lies between the layers: an error of gate that up makes up for, one of v
that the softmax leaves out.  Here the weights of a block move together, down the gradient of one loss: the squared
difference between the quantized block's output on the quantized stream and the float block's on the float one (so it
makes up for earlier blocks as well), or for the last block the KL of the predictions, which is what counts.

SignRound (Cheng et al. 2023, arXiv:2309.05516) does this from nearest codes, with the sign of the gradient and steps of
1/iterations of a code.  From codes that GPTQ found such steps lead away: the loss of a first block rose ninefold.  So
the steps are those of `kl_tuning.py`, small and by Adam; step 0 is exactly the codes that were given.

The guard: the loss is taken on held-out windows now and then, and the best is kept; the codes as they were, if that is
they.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Rates
from llmq.numerics.quantized_tensor import QuantizedTensor

JUDGED = 5  # times that the held-out loss is looked at, beside the first


class Problem(Protocol):
    """A block and its text; weights by name."""

    def put(self, weights: Mapping[str, QuantizedTensor]) -> None:
        """Give the block these weights."""

    def gradients(self, step: int) -> Mapping[str, Tensor]:
        """(N, K) of the loss in each weight as it is now, on the text of that step."""

    def held_out_loss(self) -> float:
        """The loss on text that no step sees."""


@dataclass(frozen=True)
class Tuned:
    """The weights at their best, the held-out loss before and then, and after how many steps that was (0: as given)."""

    weights: dict[str, QuantizedTensor]
    before: float
    after: float
    step: int


def tune(
    weights: Mapping[str, QuantizedTensor], references: Mapping[str, Tensor], problem: Problem, rates: Rates, steps: int
) -> Tuned:
    """Take `steps` steps; `problem` ends with the weights that are returned.

    references  (N, K) float32, the weights that were rounded: where in the cell of its code each lies
    """
    states = {name: kl_tuning.start(each, references[name], rates) for name, each in weights.items()}
    now = dict(weights)
    problem.put(now)
    before = problem.held_out_loss()
    best = Tuned(now, before, before, 0)
    for step in range(steps if before > 0 else 0):
        gradients = problem.gradients(step)
        for name, state in states.items():  # by a loss that begins at 1: nothing is then small beside Adam's epsilon
            kl_tuning.update(state, gradients[name] / before, rates.at(step, steps), step)
        now = {name: kl_tuning.result(state) for name, state in states.items()}
        problem.put(now)
        if (step + 1) % max(1, steps // JUDGED) == 0 or step + 1 == steps:
            loss = problem.held_out_loss()
            if not math.isfinite(loss):
                break
            if loss < best.after:
                best = Tuned(now, before, loss, step + 1)
    problem.put(best.weights)
    return best
