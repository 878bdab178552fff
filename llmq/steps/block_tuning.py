"""Tune a block's codes and scales when all of its weights are rounded, before it is committed.

    quantized stream ─► block with rounded weights ─► output ─┐
    float stream ─────► block as it was ────────────► output ─┴─► squared difference; behind the last block, KL

Windows of a step are drawn from those that are fitted on, in an order that depends on the block and the step alone;
what is held out judges.

Not here: how codes move and what is kept (algorithms/block_tuning.py), the streams (model/passes/hidden_states.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq.algorithms import block_tuning
from llmq.algorithms.block_tuning import Tuned
from llmq.algorithms.kl_tuning import Rates, drawn
from llmq.methods import Tuning
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import backward
from llmq.model.passes.hidden_states import Stream
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.steps.kl_loss import kl_loss


def tune(
    skeleton: Skeleton,
    stream: Stream,
    block: Block,
    weights: Mapping[str, QuantizedTensor],
    references: Mapping[str, Tensor],
    tuning: Tuning,
) -> Tuned:
    """Tune `weights`, by their paths, of the block that `stream` stands in front of; the block has the best at the end.

    references  (N, K) float32, the weights that were rounded
    """
    problem = BlockProblem(skeleton, stream, block, tuning.tokens)
    rates = Rates(tuning.rounding, tuning.scales)
    return block_tuning.tune(weights, references, problem, rates, tuning.steps)


class BlockProblem:
    """See `block_tuning.Problem`; `tokens` is how many a step sees."""

    def __init__(self, skeleton: Skeleton, stream: Stream, block: Block, tokens: int) -> None:
        self._skeleton = skeleton
        self._stream = stream
        self._block = block
        self._windows = max(1, tokens // stream.window_length)
        self._last = block is skeleton.blocks[-1]
        self._paths: list[str] = []

    def put(self, weights: Mapping[str, QuantizedTensor]) -> None:
        self._paths = list(weights)
        for path, quantized in weights.items():
            self._block.set_weight(path, quantized.dequantize())

    def gradients(self, step: int) -> dict[str, Tensor]:
        stream = self._stream
        windows = drawn(step, min(self._windows, stream.fitted), stream.fitted, seed=stream.position)
        call = stream.call_on(windows)
        parameters = [self._block.linears[path].weight for path in self._paths]
        _, output = backward.forward(self._block, call, call.hidden, parameters)
        _, slope = self._loss(windows, output.detach())
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(output, parameters, slope, allow_unused=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        each = zip(self._paths, parameters, found, strict=True)
        return {path: torch.zeros_like(weight) if slope is None else slope for path, weight, slope in each}

    def held_out_loss(self) -> float:
        held_out = range(self._stream.fitted, self._stream.windows)
        total = 0.0
        for start in range(held_out.start, held_out.stop, self._windows):
            windows = range(start, min(start + self._windows, held_out.stop))
            loss, _ = self._loss(windows, self._block.run(self._stream.call_on(windows)))
            total += loss * len(windows)
        return total / len(held_out)

    def _loss(self, windows: Sequence[int], output: Tensor) -> tuple[float, Tensor]:
        """The loss of the block's `output` (…, B, T, D) for those windows, and its gradient in that."""
        target = self._stream.original_outputs(windows)
        if self._last:
            return kl_loss(self._skeleton, self._stream.tokens_of(windows), target, output)
        difference = output.to(torch.float32) - target.to(torch.float32)
        loss = float(difference.square().sum(dtype=torch.float64)) / len(windows)
        return loss, difference.mul_(2 / len(windows)).to(output.dtype)
