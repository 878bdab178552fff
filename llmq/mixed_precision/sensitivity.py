"""How much each layer suffers from each grid, in the KL divergence of the whole model.

Layers that must be alike, because serving engines run them as one, make a *unit*: those that see one input (q, k and
v; gate and up), and all of one list of modules inside a block (experts).  Neither is found by name.  For each unit and
grid the model is run with that unit alone rounded, everything else as it was, on windows that the rounding was not
fitted on:

    ε_u,g = KL(float ‖ float with unit u on grid g)        nats per token

A loss has no slope at the float model, so to second order the KL of a whole plan is a quadratic form in what is done
to the units; with the errors of different units uncorrelated its cross terms vanish, and Σ_u ε_u,g(u) predicts it (the
same assumption as in HAWQ-V2, Dong et al. 2019, arXiv:1911.03852, measured and not taken from a Hessian).
eval/LOG.md says how far that holds.

All variants are on their way through the blocks side by side: in front of block i there are the float model's hidden
states and, for each unit before i and each grid, those of the model that was changed there.  So each block is read
once, and what lives across blocks are hidden states of a few windows.  The time is that of
units x grids x half the model.  For a model of many blocks only the coarsest grid is run; the others are scaled:

    ε_u,g = ε_u,g₀ · E_u(g) / E_u(g₀)       E_u(g) = Σ_rows (w - ŵ) H (w - ŵ)ᵀ

which is the same expansion in one direction: the KL grows as the square of the error that a unit's output has.
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
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import OnEvent, Progress, ignore
from llmq.report.sensitivity import Effect, Sensitivity, Unit

WINDOWS = 8  # on which the KL is measured, by default
MEASURED_BLOCKS = 16  # up to so many blocks, every grid is measured by itself


@dataclass(frozen=True)
class Candidate:
    """A way to store one layer: `scheme` None leaves it as it is; `bits` that it takes, scales and zeros counted."""

    scheme: WeightScheme | None
    bits: int


@dataclass(frozen=True)
class Layer:
    """A layer in question: its name in the checkpoint, its size, what it takes now, and a candidate for each grid."""

    name: str
    weights: int
    float_bits: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Question:
    """What is asked: `layers` by their paths in the model, the names of the `grids`, and how layers are rounded."""

    layers: Mapping[str, Layer]
    grids: tuple[str, ...]
    rounding: str
    options: Options


@dataclass
class _Variant:
    """A model of which one unit is rounded: its hidden states (…, B, T, D), a tensor a batch."""

    hidden: list[Tensor]
    kl: float = 0.0  # once the head was run


@dataclass
class _Trial:
    """A unit on its way: an error for each grid, and a variant for each that is measured."""

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

    `windows` (S, T) int64: the last `judged` of them measure, the others are what roundings are fitted on, `batch` at a
    time.  `exact` runs every grid, which is the default where there are few blocks.
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
        on_event(Progress("layers measured", block.index + 1, len(skeleton.blocks)))

    forward(skeleton, visit)
    variants_run = [variant for trial in measuring.trials for variant in trial.variants.values()]
    _score(skeleton, measuring.floats, variants_run)
    units = tuple(_unit(trial, question.grids) for trial in measuring.trials)
    return Sensitivity(question.grids, units, judged, tokens.numel(), notes)


def _affordable(skeleton: Skeleton, windows: Tensor, asked: int, variants: int) -> tuple[int, tuple[str, ...]]:
    """How many windows can be measured on: some must be left to fit on, and memory must hold every variant's."""
    if len(windows) == 1:
        return 1, ("there is one window of text, and the layers were measured on what their rounding was fitted on",)
    asked = min(asked, len(windows) - 1)
    window = skeleton.record(0, windows[:1]).hidden.nbytes
    blocks = memory.BLOCK_COPIES_TO_QUANTIZE * max(block.float_bytes for block in skeleton.blocks)
    fits = (memory.spare(skeleton.device) // 2 - blocks) // (window * (variants + 1))
    if fits < 1:
        raise CalibrationError(
            f"the hidden states of {variants} variants of the model do not fit into memory, not even those of one "
            f"window of {windows.shape[1]} tokens",
            hint="lower --seqlen",
        )
    if fits < asked:
        return fits, (f"measured on {fits} windows instead of {asked}, as more do not fit into memory",)
    return asked, ()


class _Measuring:
    """The float model's text, that of all variants, and the text that roundings are fitted on, block by block."""

    def __init__(self, question: Question, exact: bool, floats: Stream, fitted: Stream) -> None:
        self.floats = floats
        self.trials: list[_Trial] = []
        self._question = question
        self._exact = exact
        self._fitted = fitted

    @torch.no_grad()
    def visit(self, block: Block) -> None:
        """Run the float model and all variants through a loaded block, and add its own units to the trials."""
        calls = list(self.floats.calls())
        for trial in self.trials:
            for variant in trial.variants.values():
                pairs = zip(calls, variant.hidden, strict=True)
                variant.hidden = [block.run(call.with_hidden(state)) for call, state in pairs]
        groups = input_groups.input_groups(block, self._fitted.sample(memory.PROBE_TOKENS))
        observed = input_groups.statistics(block, groups, self._fitted.calls())
        for unit in units_of(block, groups):
            # An expert that no token reached is stored like the others of its layer, and costs nothing here.
            seen = {g: observed[g] for g in unit if observed[g].tokens or block.is_experts(g.names[0])}
            self._try(block, seen, calls)
        self.floats.past(block)
        self._fitted.past(block)

    def _try(self, block: Block, seen: Mapping[InputGroup, InputStats], calls: Sequence[Call]) -> None:
        """Put a unit on each grid, and start a variant of the model for each that is measured."""
        question = self._question
        paths = [path for group in seen for path in group.names if path in question.layers]
        if not paths:
            return
        trial = _Trial(block.path, tuple(question.layers[path] for path in paths))
        factors = {group: _factor(stats, question) for group, stats in seen.items()}
        originals = {path: block.weight(path) for path in paths}
        for grid in range(len(question.grids)):
            trial.errors.append(sum(_round(block, g, grid, seen[g], factors[g], question) for g in seen))
            if self._exact or grid == trial.coarsest:
                trial.variants[grid] = _Variant([block.run(call) for call in calls])
            for path, weight in originals.items():
                block.set_weight(path, weight)
        self.trials.append(trial)


def units_of(block: Block, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """The groups that must be alike: each alone, but for experts, and those inside of one list of modules."""
    units: dict[str, list[InputGroup]] = {}
    for group in groups:
        home = _list_around(block, group.names[0])
        units.setdefault(group.names[0] if home is None else home, []).append(group)
    return list(units.values())


def _list_around(block: Block, path: str) -> str | None:
    """The first module list of the block, on the way to `path`, that has several members."""
    inside = path.removeprefix(f"{block.path}.").split(".")
    for depth in range(1, len(inside)):
        module = block.module.get_submodule(".".join(inside[:depth]))
        if isinstance(module, SeparateExperts) or (isinstance(module, nn.ModuleList) and len(module) > 1):
            return ".".join(inside[:depth])
    return None


def _factor(stats: InputStats, question: Question) -> Factor | None:
    """Made once for all grids, where the rounding asks for one."""
    needed = algorithms.rounding(question.rounding).NEEDS_FACTOR and stats.tokens > 0
    return factorize(stats.second_moment(), question.options.order, question.options.damping) if needed else None


def _round(
    block: Block, group: InputGroup, grid: int, stats: InputStats, factor: Factor | None, question: Question
) -> float:
    """Put a group's weights on a grid; returns  Σ (w - ŵ) H (w - ŵ)ᵀ."""
    together: dict[WeightScheme, list[str]] = {}
    for path in group.names:
        scheme = question.layers[path].candidates[grid].scheme if path in question.layers else None
        if scheme is not None:
            together.setdefault(scheme, []).append(path)
    error = 0.0
    for scheme, paths in together.items():
        weights = [block.weight(path) for path in paths]
        stage = algorithms.rounding(question.rounding if stats.tokens else "rtn")
        rounding = stage.round_weight(torch.cat(weights), stats, scheme, question.options, factor)
        rounded = rounding.quantized.dequantize()
        error += float(output_error(torch.cat(weights), rounded, stats.second_moment()).sum(dtype=torch.float64))
        for path, rows in zip(paths, rounded.split([len(weight) for weight in weights]), strict=True):
            block.set_weight(path, rows)
    return error


@torch.no_grad()
def _score(skeleton: Skeleton, floats: Stream, variants: list[_Variant]) -> None:
    """The mean KL of each variant, from its last hidden states and the float model's."""
    total = floats.text.tokens.numel()
    for index, batch in enumerate(floats.text.batches()):
        tokens = floats.text.of(batch)
        expected = skeleton.logits(tokens, floats.last(batch))
        for variant in variants:
            scores = scoring.score(skeleton.logits(tokens, variant.hidden[index]), tokens, expected)
            assert scores.beside is not None, "compared with the float model's logits"
            variant.kl += float(scores.beside.divergence.sum(dtype=torch.float64)) / total


def _unit(trial: _Trial, grids: Sequence[str]) -> Unit:
    """A trial that has come to its end."""
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
