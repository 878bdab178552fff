"""Tune the codes and scales of all weights of a block together, towards the output of the float block.

Quantizing layer by layer ignores what happens between the layers: an error of gate that up compensates for, or an
error of v that the softmax suppresses.  Here all weights of a block follow the gradient of one loss.  The loss is the
squared difference between the output of the quantized block on the quantized stream and the output of the float block
on the float stream, so it also compensates for errors of earlier blocks.  Codes are the
quantized values, unsigned integers.

SignRound (Cheng et al. 2023, arXiv:2309.05516) does this from the nearest codes, with the sign of the gradient and
steps of 1/iterations of a code.  From the codes of GPTQ such steps make the result worse: the loss of a first block
rose ninefold.  So the steps are those of `kl_tuning.py`: small steps of Adam.  Step 0 is exactly the given codes.

The guard: the validation loss is measured at intervals, and the weights with the lowest one are kept.  These can be the
original weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Rates
from llmq.numerics.quantized_tensor import QuantizedTensor

JUDGED = 5  # measurements of the validation loss, in addition to the one before the first step


class Problem(Protocol):
    """A block and its calibration sequences; weights by name."""

    def put(self, name: str, weight: Tensor) -> None:
        """Set a weight (N, K) of the block."""

    def gradients(self, step: int) -> Mapping[str, Tensor]:
        """(N, K) per weight: the gradient of the loss at the current weights, on the sequences of that step."""

    def validation_loss(self) -> float:
        """The loss on the validation sequences, which no step uses."""


@dataclass(frozen=True)
class Tuned:
    """The weights with the lowest validation loss, and the step after which they were measured.

    `before` and `after` are the validation loss of the given and of these weights.  `step` 0 means the given weights.
    """

    weights: dict[str, QuantizedTensor]
    before: float
    after: float
    step: int


def tune(
    weights: Mapping[str, QuantizedTensor], references: Mapping[str, Tensor], problem: Problem, rates: Rates, steps: int
) -> Tuned:
    """Take `steps` steps.  In the end `problem` holds the weights that are returned.

    references  (N, K) float32 per weight: the float weights, whose place between two quantized values is the start
    """
    states = {name: kl_tuning.start(weight, references[name], rates) for name, weight in weights.items()}
    current = dict(weights)
    _put(problem, current)
    before = problem.validation_loss()
    best = Tuned(current, before, before, 0)
    for step in range(steps if before > 0 else 0):
        gradients = problem.gradients(step)
        current = {}
        for name, state in states.items():  # relative to the first loss, so that gradients are far above Adam's epsilon
            moved, values = kl_tuning.advance(state, gradients[name], before, rates.at(step, steps), step)
            problem.put(name, values)
            current[name] = moved
        if (step + 1) % max(1, steps // JUDGED) == 0 or step + 1 == steps:
            loss = problem.validation_loss()
            if not math.isfinite(loss):
                break
            if loss < best.after:
                best = Tuned(current, before, loss, step + 1)
    _put(problem, best.weights)
    return best


def _put(problem: Problem, weights: Mapping[str, QuantizedTensor]) -> None:
    for name, weight in weights.items():
        problem.put(name, weight.dequantize())
