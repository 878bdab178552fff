"""The sensitivity of each layer to each grid, as the KL divergence of the whole model.

Layers that must have the same grid, because serving engines run them as one, are a *unit*: layers that share an input
(q, k and v; gate and up), and all layers in one list of modules inside a block (experts). Units are not found by name.
For each unit and grid the model is run with only this unit quantized, on validation sequences, on which the
quantization was not fitted:

    ε_u,g = KL(float ‖ float with unit u on grid g)        nats per token

The KL divergence has a minimum at the float model, so to second order the KL of a whole assignment is a quadratic form
in the changes of the units. If the errors of different units are uncorrelated, its cross terms vanish, and Σ_u ε_u,g(u)
predicts it. This is the assumption of HAWQ-V2 (Dong et al. 2019, arXiv:1911.03852), but ε is measured and not derived
from a Hessian. eval/LOG.md shows how well it holds.

All variants go through the blocks together: before block i there are the hidden states of the float model and, for each
unit before i and each grid, those of the model in which this unit is quantized. So each block is read once, and only
hidden states of a few sequences are kept from one block to the next. The time is that of units x grids x half the
model. For models with many blocks only the coarsest grid g₀ is run; the values of the others are scaled:

    ε_u,g = ε_u,g₀ · E_u(g) / E_u(g₀)       E_u(g) = Σ_rows (w - ŵ) H (w - ŵ)ᵀ

This is the same expansion in one direction: the KL grows with the square of the error of a unit's output.

With `Question.inputs` the weights stay in float, and the inputs of a unit are quantized instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq import algorithms, memory
from llmq.algorithms import Options, output_error
from llmq.algorithms.factor import Factor, factorize
from llmq.errors import CalibrationError
from llmq.evaluation import scoring
from llmq.evaluation.streaming import windows_together
from llmq.mixed_precision import measured_inputs
from llmq.model.analyse import input_groups
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import SeparateExperts
from llmq.model.passes.forward import forward
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Text
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.report.events import MEASURING, OnEvent, Progress, ignore
from llmq.report.sensitivity import Effect, Sensitivity, Unit

WINDOWS = 8  # default number of sequences on which the KL is measured
MEASURED_BLOCKS = 16  # in models with at most this many blocks, every grid is measured


@dataclass(frozen=True)
class Candidate:
    """A way to store one layer: `scheme` (None: float) and the total `bits`, including scales and zero points."""

    scheme: WeightScheme | None
    bits: int


@dataclass(frozen=True)
class Layer:
    """A layer to measure: its name in the checkpoint, number of weights, bits in float, and one candidate per grid."""

    name: str
    weights: int
    float_bits: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Question:
    """What to measure: `layers` by path in the model, the names of the `grids`, and the rounding stage with options.

    inputs  how the inputs of the layers are quantized, if these are measured and not their weights; the only grid
    """

    layers: Mapping[str, Layer]
    grids: tuple[str, ...]
    rounding: str
    options: Options
    inputs: InputScheme | None = None


@dataclass
class _Variant:
    """A model in which one unit is quantized: its hidden states, one tensor (…, B, T, D) per batch."""

    hidden: list[Tensor]
    kl: float = 0.0  # set when the head has been run


@dataclass
class _Trial:
    """A unit while it is measured: the error of each grid, and a variant for each grid that is run."""

    block: str
    layers: tuple[Layer, ...]
    errors: list[float] = field(default_factory=list)
    variants: dict[int, _Variant] = field(default_factory=dict)

    def bits(self, grid: int) -> int:
        return sum(layer.candidates[grid].bits for layer in self.layers)

    @property
    def coarsest(self) -> int:
        return min(range(len(self.layers[0].candidates)), key=self.bits)


def measure(
    skeleton: Skeleton,
    windows: Tensor,
    question: Question,
    *,
    batch: int,
    judged: int = WINDOWS,
    exact: bool | None = None,
    on_event: OnEvent = ignore,
) -> Sensitivity:
    """Run the model for every unit.

    windows  (S, T) int64, sequences
    judged   number of sequences, the last ones, on which the KL is measured; quantization is fitted on the others
    batch    number of sequences that run together for fitting
    exact    run every grid; default: only in models with few blocks
    """
    exact = len(skeleton.blocks) <= MEASURED_BLOCKS if exact is None else exact
    variants = len(question.layers) * (len(question.grids) if exact else 1)
    judged, notes = _affordable(skeleton, windows, judged, variants)
    tokens = windows[len(windows) - judged :]
    measured = Text(tokens, min(windows_together(tokens.shape[1], skeleton.vocabulary), judged))
    fitted = Text(windows[: len(windows) - judged] if len(windows) > judged else windows, batch)
    calls, storage = RecordedCalls(skeleton), Storage(skeleton.device)
    measuring = _Measuring(
        question, exact, Stream(skeleton, measured, calls, storage), Stream(skeleton, fitted, calls, storage)
    )

    def visit(block: Block) -> None:
        measuring.visit(block)
        done, blocks = block.index + 1, len(skeleton.blocks)
        on_event(Progress(MEASURING, done, blocks, share=done * (done + 1) / (blocks * (blocks + 1))))

    if question.inputs is None:
        with skeleton.float_inputs():
            forward(skeleton, visit)
    else:
        skeleton.quantize_inputs({})  # those of one unit at a time are quantized
        forward(skeleton, visit)
    variants_run = [variant for trial in measuring.trials for variant in trial.variants.values()]
    _score(skeleton, measuring.floats, variants_run)
    units = tuple(_unit(trial, question.grids) for trial in measuring.trials)
    return Sensitivity(question.grids, units, judged, tokens.numel(), notes)


def _affordable(skeleton: Skeleton, windows: Tensor, requested: int, variants: int) -> tuple[int, tuple[str, ...]]:
    """The number of sequences to measure on, and notes: one is needed for fitting, and all variants must fit."""
    if len(windows) == 1:
        return 1, ("there is one sequence of text, so the layers were measured on the text that they were fitted on",)
    requested = min(requested, len(windows) - 1)
    sequence = skeleton.hidden_bytes(windows.shape[1])
    blocks = memory.BLOCK_COPIES_TO_QUANTIZE * max(block.float_bytes for block in skeleton.blocks)
    fits = (memory.spare(skeleton.device) // 2 - blocks) // (sequence * (variants + 1))
    if fits < 1:
        raise CalibrationError(
            f"the hidden states of {variants} variants of the model do not fit into memory, not even those of one "
            f"sequence of {windows.shape[1]} tokens",
            hint="lower --seqlen",
        )
    if fits < requested:
        return fits, (f"measured on {fits} sequences instead of {requested}, more do not fit into memory",)
    return requested, ()


class _Measuring:
    """The streams of the float model, of all variants, and of the fitted text, block by block."""

    def __init__(self, question: Question, exact: bool, floats: Stream, fitted: Stream) -> None:
        self.floats = floats
        self.trials: list[_Trial] = []
        self._question = question
        self._exact = exact
        self._fitted = fitted

    @torch.no_grad()
    def visit(self, block: Block) -> None:
        """Run the float model and all variants through a loaded block, and add the units of the block to the trials."""
        calls = list(self.floats.calls())
        for trial in self.trials:
            for variant in trial.variants.values():
                pairs = zip(calls, variant.hidden, strict=True)
                variant.hidden = [block.run(call.with_hidden(state)) for call, state in pairs]
        groups = input_groups.input_groups(block, self._fitted.sample(memory.PROBE_TOKENS))
        inputs = self._question.inputs
        ranges = inputs is not None and inputs.calibrated
        observed = input_groups.statistics(block, groups, self._fitted.calls(), histograms=ranges)
        for unit in units_of(block, groups):
            # An expert that no token reached is stored like the other experts of its layer, and has no error here.
            stats = {g: observed[g] for g in unit if observed[g].tokens or block.is_experts(g.names[0])}
            self._try(block, stats, calls)
        self.floats.past(block)
        self._fitted.past(block)

    def _try(self, block: Block, unit: Mapping[InputGroup, InputStats], calls: Sequence[Call]) -> None:
        """Quantize a unit on each grid, and start a variant of the model for each grid that is run."""
        question = self._question
        paths = [path for group in unit for path in group.names if path in question.layers]
        if not paths:
            return
        trial = _Trial(block.path, tuple(question.layers[path] for path in paths))
        if question.inputs is not None:
            block.quantize_inputs(measured_inputs.schemes_of(unit, paths, question.inputs))
            trial.errors.append(0.0)
            trial.variants[0] = _Variant([block.run(call) for call in calls])
            block.quantize_inputs({})
            self.trials.append(trial)
            return
        factors = {group: _factor(stats, question) for group, stats in unit.items()}
        originals = {path: block.weight(path) for path in paths}
        for grid in range(len(question.grids)):
            trial.errors.append(sum(_round(block, g, grid, unit[g], factors[g], question) for g in unit))
            if self._exact or grid == trial.coarsest:
                trial.variants[grid] = _Variant([block.run(call) for call in calls])
            for path, weight in originals.items():
                block.set_weight(path, weight)
        self.trials.append(trial)


def units_of(block: Block, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """The groups of each unit: a single group, or all groups inside a list of modules or a layer of experts."""
    units: dict[str, list[InputGroup]] = {}
    for group in groups:
        module_list = _list_around(block, group.names[0])
        units.setdefault(group.names[0] if module_list is None else module_list, []).append(group)
    return list(units.values())


def _list_around(block: Block, path: str) -> str | None:
    """The outermost module list with several members, or layer of experts, that contains the layer at `path`."""
    inside = path.removeprefix(f"{block.path}.").split(".")
    for depth in range(1, len(inside)):
        module = block.module.get_submodule(".".join(inside[:depth]))
        if isinstance(module, SeparateExperts) or (isinstance(module, nn.ModuleList) and len(module) > 1):
            return ".".join(inside[:depth])
    return None


def _factor(stats: InputStats, question: Question) -> Factor | None:
    """The factor of the Hessian, shared by all grids; None if the rounding stage does not use it."""
    needed = algorithms.rounding(question.rounding).NEEDS_FACTOR and stats.tokens > 0
    return factorize(stats.second_moment(), question.options.order, question.options.damping) if needed else None


def _round(
    block: Block, group: InputGroup, grid: int, stats: InputStats, factor: Factor | None, question: Question
) -> float:
    """Quantize a group's weights on a grid; returns  Σ (w - ŵ) H (w - ŵ)ᵀ."""
    by_scheme: dict[WeightScheme, list[str]] = {}
    for path in group.names:
        scheme = question.layers[path].candidates[grid].scheme if path in question.layers else None
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(path)
    error = 0.0
    for scheme, paths in by_scheme.items():
        weights = [block.weight(path) for path in paths]
        stage = algorithms.rounding(question.rounding if stats.tokens else "rtn")
        rounding = stage.round_weight(torch.cat(weights), stats, scheme, question.options, factor)
        dequantized, loss = rounding.quantized.dequantize(), rounding.loss
        if loss is None:
            loss = output_error(torch.cat(weights), dequantized, stats.second_moment())
        error += float(loss.sum(dtype=torch.float64))
        for path, rows in zip(paths, dequantized.split([len(weight) for weight in weights]), strict=True):
            block.set_weight(path, rows)
    return error


@torch.no_grad()
def _score(skeleton: Skeleton, floats: Stream, variants: list[_Variant]) -> None:
    """Compute the mean KL of each variant, from its last hidden states and those of the float model."""
    total = floats.text.tokens.numel()
    for index, batch in enumerate(floats.text.batches()):
        tokens = floats.text.of(batch)
        expected = skeleton.logits(tokens, floats.last(batch))
        for variant in variants:
            scores = scoring.score(skeleton.logits(tokens, variant.hidden[index]), tokens, expected)
            assert scores.comparison is not None, "compared with the float model's logits"
            variant.kl += float(scores.comparison.divergence.sum(dtype=torch.float64)) / total


def _unit(trial: _Trial, grids: Sequence[str]) -> Unit:
    """The result of a finished trial."""
    base = trial.coarsest
    per_error = trial.variants[base].kl / trial.errors[base] if trial.errors[base] > 0 else 0.0
    effects = []
    for grid, name in enumerate(grids):
        measured = grid in trial.variants
        kl = trial.variants[grid].kl if measured else per_error * trial.errors[grid]
        schemes = tuple(layer.candidates[grid].scheme for layer in trial.layers)
        effects.append(Effect(name, schemes, trial.bits(grid), trial.errors[grid], kl, measured))
    return Unit(
        trial.block,
        tuple(layer.name for layer in trial.layers),
        sum(layer.weights for layer in trial.layers),
        sum(layer.float_bits for layer in trial.layers),
        tuple(effects),
    )
