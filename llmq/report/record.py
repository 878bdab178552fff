"""The record of a run: append-only, plain values, stored as `llmq.json` beside the quantized weights."""

import dataclasses
import math
import resource
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTSIDE_THE_BLOCKS = "outside the blocks"  # why embeddings and heads stay as they are: expected, not worth a note


@dataclass(frozen=True)
class StageGain:
    """What one stage did for one layer: ‖X Wᵀ - X̂ Ŵᵀ‖²/T over held-out tokens, and whether it was kept.

    Of a stage that works on a block it is the squared error of the block's output, by itself or as the stage weighs it.

    X is what the float model feeds the layer and X̂ what the rounded layers before it do (X̂ for both where the former
    is not known).  `after` is what the stage would have made of it where it was undone.
    """

    stage: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class StageSummary:
    """A stage over all layers; `change` is that of the summed loss, -0.1 for a tenth less.

    Of a stage over all blocks, whose losses are not of one kind, `change` is the mean of each one's.
    """

    stage: str
    kept: int
    layers: int
    change: float
    kind: str = "weights"  # what `layers` counts

    @property
    def outcome(self) -> str:
        return f"kept in {self.kept} of {self.layers} {self.kind}, held-out error {100 * self.change:+.1f} %"


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: its grid, and how far rounding moved it.

    weight_error  ‖W - Ŵ‖ / ‖W‖
    output_error  ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens; None where nothing was observed
    tokens        that the layer saw
    borrowed      of an expert: how many other tokens of its layer were counted beside them, because it saw too few
    expert        whether it belongs to an expert of a mixture

    Both are of the rounding.  Tuning, which may come after it, gives them up for the model's own loss; what that was
    worth is in `TuningReport`.
    """

    name: str
    scheme: str
    bits_per_weight: float
    weight_error: float
    output_error: float | None = None
    tokens: int = 0
    damping: float | None = None
    notes: tuple[str, ...] = ()
    gains: tuple[StageGain, ...] = ()
    borrowed: int = 0
    expert: bool = False

    @property
    def error(self) -> float:
        """What best says how much the layer suffered: the output error where there is one."""
        return self.weight_error if self.output_error is None else self.output_error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerReport":
        gains = tuple(StageGain(**gain) for gain in values["gains"])
        return cls(**{**values, "notes": tuple(values["notes"]), "gains": gains})

    @property
    def signal_to_noise(self) -> float:
        """In decibels; infinite where nothing was lost."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


@dataclass(frozen=True)
class BlockReport:
    """One decoder block: its layers, what happened to it as a whole, how long it took.

    gains  what transforms did for the error of the block's output over held-out tokens, with their layers rounded;
           and what block tuning did, after all were rounded as they say (algorithms/block_tuning.py)
    """

    path: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    resumed: bool = False
    gains: tuple[StageGain, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, resumed: bool) -> "BlockReport":
        layers = tuple(LayerReport.from_dict(layer) for layer in values["layers"])
        gains = tuple(StageGain(**gain) for gain in values["gains"])
        return cls(values["path"], layers, tuple(values["notes"]), values["seconds"], resumed, gains)


@dataclass(frozen=True)
class TuningStep:
    """How far end-to-end tuning is: the loss of the last batch, and of the held-out windows where they were looked at.

    Both are KL(float ‖ quantized) in nats per token; `loss` is None in front of the first step.
    """

    step: int
    steps: int
    loss: float | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class TuningReport:
    """What end-to-end tuning bought, on windows that it was not fitted on.

    steps    that were taken
    best     after how many of them the model was best, and is kept; 0 where none was better than no tuning
    history  (step, KL(float ‖ quantized) in nats per token of the held-out windows)
    moved    the part of all codes that are not what they were
    """

    steps: int
    best: int
    history: tuple[tuple[int, float], ...]
    moved: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        losses = dict(self.history)
        if self.best == 0:
            return f"undone, none of {self.steps} steps was better on held-out text (KL {losses[0]:.4g})"
        return (
            f"held-out KL {losses[0]:.4g} → {losses[self.best]:.4g} over {self.steps} steps (best at {self.best}), "
            f"{self.moved:.1%} of the codes moved, {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TuningReport":
        history = tuple((step, loss) for step, loss in values["history"])
        return cls(**{**values, "history": history, "notes": tuple(values["notes"])})


@dataclass
class Report:
    """The whole run.

    bits_per_weight counts scales and zeros, over the weights that were quantized; `left` maps each linear layer that
    stayed as it is to the reason; `stages` is what each one bought; `sizes` are the bytes of each format where there
    are several, `checksums` the SHA-256 of the files of weights; `notes` are the fallbacks and surprises that a user
    should know of.
    """

    source: str
    output: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    tuning: TuningReport | None = None
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stages: list[StageSummary] = field(default_factory=list)
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    file_bytes: int = 0
    original_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def layers(self) -> list[LayerReport]:
        return [layer for block in self.blocks for layer in block.layers]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summaries(layers: Iterable[LayerReport]) -> list[StageSummary]:
    """What each stage did over all layers, in the order in which they run."""
    gains: dict[str, list[StageGain]] = {}
    places: dict[str, int] = {}  # a layer may have gone without the first stages
    for layer in layers:
        for place, gain in enumerate(layer.gains):
            gains.setdefault(gain.stage, []).append(gain)
            places[gain.stage] = max(place, places.get(gain.stage, 0))
    found = []
    for stage in sorted(gains, key=places.__getitem__):
        each = gains[stage]
        before = sum(gain.before for gain in each)
        saved = sum(gain.before - gain.after for gain in each if gain.kept)
        kept = sum(gain.kept for gain in each)
        found.append(StageSummary(stage, kept, len(each), -saved / before if before > 0 else 0.0))
    return found


def experts_summary(layers: Iterable[LayerReport]) -> str | None:
    """How many tokens the experts of a mixture saw; None where there are none, or no text was read."""
    experts = [layer for layer in layers if layer.expert]
    if not any(layer.tokens + layer.borrowed for layer in experts):
        return None
    seen = sorted(layer.tokens for layer in experts)
    starved = sum(layer.borrowed > 0 for layer in experts)
    borrowed = f"; {starved} of {len(experts)} weights borrowed others of their layer" if starved else ""
    return f"saw {seen[0]} tokens or more, {statistics.median(seen):g} in the median{borrowed}"


def block_summaries(blocks: Iterable[BlockReport]) -> list[StageSummary]:
    """The same for the stages that work on whole blocks; a transform may have changed several places of a block."""
    gains: dict[str, list[StageGain]] = {}
    for gain in (gain for block in blocks for gain in block.gains):
        gains.setdefault(gain.stage, []).append(gain)
    found = []
    for stage, each in gains.items():
        changes = [gain.after / gain.before - 1 for gain in each if gain.kept]
        found.append(StageSummary(stage, len(changes), len(each), sum(changes) / len(each), "blocks"))
    return found


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had in use so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with what the parent process had
        lines = status.read_text(encoding="utf-8").splitlines()
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        if found:
            return int(found[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
