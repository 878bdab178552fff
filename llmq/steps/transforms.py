"""Apply transforms to a model: rewrite a float block into an equal one that is quantized with less error.

A transform chooses a basis for the weights that share an input (algorithms/awq.py, rotation.py); its inverse is folded
into the module that makes this input (model/analyse/fold.py). Every rewrite is checked by running the block before and
after. It is undone if it changes the output, or does not lower the error of the quantized block on validation text.
With several ranks, all of them collect the statistics. The first one chooses the rewrites for all, from the sample of
text that a single process would take, whichever ranks have it.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmq import algorithms
from llmq.memory import PROBE_TOKENS
from llmq.model.analyse import fold, input_groups
from llmq.model.analyse.fold import FoldSite
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block, Call
from llmq.model.passes.streams import Streams
from llmq.numerics.block_diagonal import columns, inverse
from llmq.numerics.input_stats import InputStats
from llmq.report.events import TRANSFORMS, Progress
from llmq.report.record import StageGain
from llmq.steps.input_loss import product_loss
from llmq.steps.round_group import Rounded, round_group
from llmq.steps.run import Run

LOSS_TOKENS = 1024  # to choose a basis and to check a rewrite
SMOOTH = "smooth"  # the transform for quantized inputs

Observed = dict[InputGroup, InputStats]


def transform_block(
    run: Run, block: Block, groups: Sequence[InputGroup], fixed: Collection[str] = ()
) -> tuple[list[str], list[StageGain]]:
    """Apply each transform of the method to the float block, with statistics of the float block.

    fixed  paths of layers whose weights may not change, because they already lie on a grid
    Returns notes for the user, and the gain of each rewrite.
    """
    streams = run.streams
    assert streams is not None, "a method that transforms needs calibration"
    transforms = BlockTransforms(run, streams, block, groups, fixed)
    if run.ranks.is_first:
        for stage in run.method.transforms:
            transforms.apply(stage)
    notes, gains = run.ranks.first(lambda: (transforms.notes, transforms.gains))
    for parameter in block.module.parameters():
        run.ranks.copy_(parameter.data)
    packed = {f"{run.plans[path].name}.weight" for path in block.linears if run.plans[path].scheme.weights is not None}
    kept = {name: tensor for name, tensor in block.stored_parameters().items() if name not in packed}
    block.set_stored_parameters(kept)  # rounds changed parameters to the dtype in which the file stores them
    streams.transformed(block)
    return notes, gains


class BlockTransforms:
    """A block that is being rewritten; `observed` has the statistics of the inputs of its weights in their basis."""

    def __init__(
        self, run: Run, streams: Streams, block: Block, groups: Sequence[InputGroup], fixed: Collection[str] = ()
    ) -> None:
        self._run = run
        self._fixed = {*fixed, *(path for path, plan in run.plans.items() if plan.scheme.weights is None)}
        self._block = block
        stream = streams.quantized
        self._probe, self._call = stream.sample(PROBE_TOKENS), stream.sample(LOSS_TOKENS, run.ranks)
        self._validation = stream.validation_sample(LOSS_TOKENS, run.ranks)
        shared = [group for group in groups if not block.is_experts(group.names[0])]  # experts are not transformed
        self.observed: Observed = input_groups.statistics(
            block, shared, stream.fitted_calls(), stream.text.unit * stream.text.length
        )
        for stats in self.observed.values():
            stats.sum_over(run.ranks)
        self.notes: list[str] = []
        self.gains: list[StageGain] = []

    def apply(self, stage: str) -> None:
        """Apply one transform to each group of the block, one after the other."""
        sites = self._sites()
        with self._block.float_inputs():
            before = self._block.run(self._call)
        for group, stats in self._counted(stage):
            if any(path in self._fixed for path in group.names):
                continue  # a layer that is kept in float, or on its existing grid, is not rewritten
            if stage == SMOOTH and not all(map(self._block.inputs.gain_from_smoothing, group.names)):
                continue
            if group not in sites:
                self.notes.append(
                    f"{', '.join(group.names)}: {stage} was not applied, no module was found that makes their input"
                )
                continue
            site = sites[group]
            width = partial(fold.mixing_width, self._block, site, self._probe)
            loss = partial(self._loss_in_basis, group, stats, before)
            if stage == SMOOTH:
                loss = partial(product_loss, self._run, self._block, group, self._inputs(group, self._call))
            basis = algorithms.transform(stage).basis(stats, site.source, width, loss)
            if basis is not None:
                self._rewrite(stage, site, basis)

    def _counted(self, stage: str) -> Iterator[tuple[InputGroup, InputStats]]:
        """The groups and their statistics; an event is reported when one is finished."""
        method, groups, blocks = self._run.method, len(self.observed), len(self._run.skeleton.blocks)
        before = method.transforms.index(stage) * groups
        total = len(method.transforms) * groups
        for number, (group, stats) in enumerate(list(self.observed.items())):
            yield group, stats
            share = (self._block.index + (before + number + 1) / total) / blocks
            event = Progress(TRANSFORMS, before + number + 1, total, "groups", self._block.path, share=share)
            self._run.on_event(event)

    def _sites(self) -> dict[InputGroup, FoldSite]:
        """The fold site of each group, except where the producer is kept in float or cannot be changed."""
        weights = self._run.skeleton.weights
        sites = fold.discover(self._block, list(self.observed), self._probe)
        producers = [(site, f"{self._block.path}.{site.producer}") for site in sites]
        return {
            s.group: s for s, path in producers if path not in self._fixed and not weights.is_fixed(f"{path}.weight")
        }

    def _rewrite(self, stage: str, site: FoldSite, basis: Tensor) -> None:
        """Fold a basis into its site.

        It is undone, bit for bit, if it changes the block's output, or if it does not lower the error of the output
        with the weights on both sides quantized (for smoothing: the error of the layers with weights and inputs
        quantized). The error is taken on validation text if there is any.
        """
        block, call = self._block, self._validation or self._call
        paths = {*site.group.names, f"{block.path}.{site.producer}"}
        with block.float_inputs():  # the float model's outputs are the target
            before = block.run(self._call)
            expected = block.run(call) if self._validation else before

        def lost(observed: Observed) -> float:
            if stage == SMOOTH:
                return product_loss(self._run, block, site.group, self._inputs(site.group, call))
            return self._quantized_loss(paths, call, expected, observed)

        plain = lost(self.observed)
        undo, folded = fold.apply(block, site, basis)
        with block.float_inputs():
            change = fold.moved(self._call.hidden, before, block.run(self._call))
        if change > fold.OUTPUT_TOLERANCE:
            undo()
            self.notes.append(
                f"{', '.join(site.group.names)}: {stage} was undone, it changed the block's output by {change:.1e}"
            )
            return
        rewritten = {**self.observed, site.group: self.observed[site.group].in_basis(folded)}
        loss = lost(rewritten)
        if loss < plain:
            self.observed[site.group] = rewritten[site.group]
        else:
            undo()
        if self._validation:
            self.gains.append(StageGain(stage, plain, loss, loss < plain))

    def _inputs(self, group: InputGroup, call: Call) -> Tensor:
        """The float inputs (..., K) of a group."""
        with self._block.float_inputs():
            return input_groups.inputs_of(self._block, [group], call)[0][group]

    def _quantized_loss(self, paths: Collection[str], call: Call, expected: Tensor, observed: Observed) -> float:
        """Squared error per token of the block's output when the layers in `paths` are quantized."""
        quantized: dict[str, Tensor] = {}
        for group, stats in observed.items():
            weights = {path: self._block.weight(path) for path in group.names if path in paths}
            layers = round_plainly(self._run, weights, stats)
            quantized |= {layer.path: layer.rounding.quantized.dequantize() for layer in layers}
        return output_loss(self._block, quantized, call, expected)

    def _loss_in_basis(self, group: InputGroup, stats: InputStats, expected: Tensor, basis: Tensor) -> float:
        """Squared error per token of the block's output when the group's weights are quantized in another basis."""
        weights = {path: columns(self._block.weight(path), basis) for path in group.names}
        layers = round_plainly(self._run, weights, stats.in_basis(basis))
        back = inverse(basis)
        quantized = {layer.path: columns(layer.rounding.quantized.dequantize(), back) for layer in layers}
        return output_loss(self._block, quantized, self._call, expected)


def round_plainly(run: Run, weights: Mapping[str, Tensor], stats: InputStats) -> list[Rounded]:
    """Quantize weights with the rounding stage of the method, without targets and refinements."""
    plain = dataclasses.replace(run.method, alphas=(), refinements=())
    return round_group(weights, {path: run.plans[path].scheme.weights for path in weights}, stats, plain, run.options)


def output_loss(block: Block, weights: Mapping[str, Tensor], call: Call, expected: Tensor) -> float:
    """‖f(x; Ŵ) - f(x; W)‖² per token, where f(x; W) is `expected`; the block's weights are restored afterwards."""
    originals = {path: block.weight(path) for path in weights}
    for path, weight in weights.items():
        block.set_weight(path, weight)
    loss = float((block.run(call) - expected).to(torch.float32).square().sum()) / call.hidden[..., 0].numel()
    for path, weight in originals.items():
        block.set_weight(path, weight)
    return loss
