"""Tune a block's quantized values and scales when all of its weights are quantized, before it is committed.

    quantized stream ─► block with quantized weights ─► output ─┐
    float stream ─────► block with float weights ─────► output ─┴─► difference ─► loss

The loss is the squared difference, or the difference weighted by Fisher information: how much it costs the model's
loss.

The sequences of a step are drawn from the fitted ones, in an order that depends only on the block and the step. The
best version on the validation sequences is kept. With several ranks, each one draws from its share, and their gradients
are averaged.

Not here: how quantized values change and what is kept (algorithms/block_tuning.py), the streams
(model/passes/streams.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llmq.algorithms import block_tuning
from llmq.algorithms.block_tuning import Tuned
from llmq.algorithms.fisher_weights import OutputMetric
from llmq.algorithms.kl_tuning import Rates, drawn
from llmq.methods import Tuning
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.backward import differentiable, gradients_of
from llmq.model.passes.streams import Streams
from llmq.report.events import BLOCK_TUNING, OnEvent, Progress, ignore
from llmq.steps.round_group import Rounded


def tune(
    skeleton: Skeleton,
    streams: Streams,
    block: Block,
    layers: Mapping[str, Rounded],
    tuning: Tuning,
    metric: OutputMetric | None = None,
    on_event: OnEvent = ignore,
) -> Tuned:
    """Tune the quantized weights of the block whose inputs the streams hold; the best version is put into the block.

    The float stream must have the outputs of the float block already. `metric` is that of the block's outputs; without
    it all errors count alike.
    """

    def at_step(step: int) -> None:
        done, total = block.index * tuning.steps + step, len(skeleton.blocks) * tuning.steps
        on_event(Progress(BLOCK_TUNING, step, tuning.steps, "steps", block.path, share=done / total))

    problem = BlockProblem(skeleton, streams, block, layers, tuning.tokens, metric, at_step)
    weights = {path: layer.rounding.quantized for path, layer in layers.items()}
    references = {path: layer.weight for path, layer in layers.items()}
    tuned = block_tuning.tune(weights, references, problem, Rates(tuning.rounding, tuning.scales), tuning.steps)
    at_step(tuning.steps)
    return tuned


class BlockProblem:
    """Implements `block_tuning.Problem` for the weights at `paths`.

    A step uses `tokens` tokens, and calls `at_step` with its number first.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        streams: Streams,
        block: Block,
        paths: Iterable[str],
        tokens: int,
        metric: OutputMetric | None = None,
        at_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        assert streams.floats is not None, "there is no float stream"
        self._text = streams.text
        self._quantized, self._floats = streams.quantized, streams.floats
        self._block = block
        self._metric = None if metric is None else metric.to(skeleton.device)
        self._ranks = streams.ranks
        self._sequences = max(1, tokens // self._text.length // self._ranks.size)  # of this rank, per step
        self._at_step = at_step
        self._paths = list(paths)

    def put(self, name: str, weight: Tensor) -> None:
        self._block.set_weight(name, weight)

    def gradients(self, step: int) -> dict[str, Tensor]:
        self._at_step(step)
        fitted = self._text.fitted
        sequences = drawn(step, min(self._sequences, fitted), fitted, seed=self._block.index)
        parameters = [self._block.linears[path].weight for path in self._paths]
        graph = differentiable(self._block, self._quantized.call(sequences), parameters, of_input=False)
        _, output_gradient = self._loss(sequences, graph[1].detach())
        gradients = gradients_of(graph, parameters, output_gradient)
        return dict(zip(self._paths, map(self._ranks.mean, gradients), strict=True))

    def validation_loss(self) -> float:
        text, total = self._text, 0.0
        for start in range(text.fitted, text.sequences, self._sequences):
            sequences = range(start, min(start + self._sequences, text.sequences))
            loss, _ = self._loss(sequences, self._block.run(self._quantized.call(sequences)))
            total += loss * len(sequences)
        total, count = self._ranks.total(total, text.validation)
        return total / count

    def _loss(self, sequences: Sequence[int], output: Tensor) -> tuple[float, Tensor]:
        """The loss of the block's `output` (…, B, T, D) for these sequences, and its gradient with respect to it."""
        target = self._floats.outputs(sequences)
        difference = output.to(torch.float32) - target.to(torch.float32)
        if self._metric is not None:
            loss, gradient = self._metric.loss(difference, sequences)
            return loss / len(sequences), gradient.mul_(2 / len(sequences)).to(output.dtype)
        loss = float(difference.square().sum(dtype=torch.float64)) / len(sequences)
        return loss, difference.mul_(2 / len(sequences)).to(output.dtype)
