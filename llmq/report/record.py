"""The record of a run: append-only, plain values, stored as `llmq.json` next to the quantized weights."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq.report.forecast import Forecast
from llmq.report.shown import Shown, Table, duration, megabytes
from llmq.report.verdict import Verdict

LAYERS_SHOWN = 6
OUTSIDE_THE_BLOCKS = "outside the blocks"  # why embeddings and heads are kept in float: expected, so without a note


@dataclass(frozen=True)
class StageGain:
    """The effect of one stage on one layer: ‖X Wᵀ - X̂ Ŵᵀ‖²/T over validation tokens, and whether it was kept.

    X are the inputs of the layer in the float model, X̂ its inputs after the quantized layers before it (X̂ for both if X
    is not known). For a stage that works on a block it is the squared error of the block's output, optionally weighted
    by the stage. If the stage was undone, `after` is the error that it would have had.
    """

    stage: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class StageSummary:
    """The effect of a stage on all layers; `change` is the relative change of the summed loss, -0.1 for 10 % less.

    The losses of blocks are not comparable, so for a stage on blocks `change` is the mean of the relative changes.
    """

    stage: str
    kept: int
    layers: int
    change: float
    kind: str = "weights"  # what `layers` counts

    @property
    def outcome(self) -> str:
        return f"kept in {self.kept} of {self.layers} {self.kind}, validation error {100 * self.change:+.1f} %"


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: its grid and its quantization errors.

    weight_error  ‖W - Ŵ‖ / ‖W‖
    output_error  ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens; None without calibration
    tokens        number of tokens that the layer saw
    rtn_error     the output error if the weight was rounded to nearest, with searched scales, for the same tokens; None
                  without calibration and for experts, where it would take more than a twentieth of the time of gptq
    borrowed      for an expert: number of other tokens of its layer that were added, because it saw too few
    expert        whether it belongs to an expert of a mixture of experts
    existing_grid  the grid that the weights already lay on, if their codes were taken over; else ""
    weight_outlier      the largest weight / the root mean square of all weights
    activation_outlier  the root mean square of the largest input channel / that of the median channel
    scales              how many scales are in [2^(e-1), 2^e), as pairs of e and the number

    Both errors are measured after rounding. End-to-end tuning may increase them to lower the loss of the model; its
    effect is in `TuningReport`.
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
    existing_grid: str = ""
    weight_outlier: float | None = None
    activation_outlier: float | None = None
    scales: tuple[tuple[int, int], ...] = ()
    rtn_error: float | None = None

    @property
    def error(self) -> float:
        """The output error, or the weight error without calibration."""
        return self.weight_error if self.output_error is None else self.output_error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerReport":
        gains = tuple(StageGain(**gain) for gain in values["gains"])
        scales = tuple((exponent, count) for exponent, count in values["scales"])
        return cls(**{**values, "notes": tuple(values["notes"]), "gains": gains, "scales": scales})

    @property
    def signal_to_noise(self) -> float:
        """The signal-to-noise ratio in decibels; infinite without an error."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


@dataclass(frozen=True)
class BlockReport:
    """One decoder block: its layers, its notes and the time it took.

    gains  the effect of transforms on the error of the block's output over validation tokens, with quantized layers;
           and the effect of block tuning after rounding (algorithms/block_tuning.py)
    host_bytes, device_bytes  peak memory of the process so far, in main memory and on a GPU
    """

    path: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    resumed: bool = False
    gains: tuple[StageGain, ...] = ()
    host_bytes: int = 0
    device_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, resumed: bool) -> "BlockReport":
        layers = tuple(LayerReport.from_dict(layer) for layer in values["layers"])
        gains = tuple(StageGain(**gain) for gain in values["gains"])
        changed = {"layers": layers, "gains": gains, "notes": tuple(values["notes"]), "resumed": resumed}
        return cls(**{**values, **changed})


@dataclass(frozen=True)
class TuningStep:
    """The progress of end-to-end tuning: the loss of the last batch, and the validation loss if it was evaluated.

    Both are KL(float ‖ quantized) in nats per token; `loss` is None before the first step.
    """

    step: int
    steps: int
    loss: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class TuningReport:
    """The effect of end-to-end tuning on the validation sequences.

    steps    number of steps
    best     the step with the best model, which is kept; 0 if no step was better than no tuning
    history  (step, validation KL(float ‖ quantized) in nats per token); empty if tuning was left out
    moved    fraction of the quantized values that changed
    """

    steps: int
    best: int
    history: tuple[tuple[int, float], ...]
    moved: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        losses = dict(self.history)
        if not losses:
            return "left out (see the notes)"
        if self.best == 0:
            return f"undone, because none of {self.steps} steps was better on validation text (KL {losses[0]:.4g})"
        return (
            f"validation KL {losses[0]:.4g} → {losses[self.best]:.4g} over {self.steps} steps (best at {self.best}), "
            f"{self.moved:.1%} of the quantized values changed, {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TuningReport":
        history = tuple((step, loss) for step, loss in values["history"])
        return cls(**{**values, "history": history, "notes": tuple(values["notes"])})


@dataclass(frozen=True)
class ExpertTokens:
    """The calibration tokens of the experts of one layer (validation tokens are not counted).

    layer    the module of the experts: `model.layers.3.mlp.experts`
    experts  the number of its quantized experts
    minimum, median, maximum  tokens per expert
    under_sampled  number of experts that saw too few tokens, so that other tokens of the layer were added to their
                   statistics
    """

    layer: str
    experts: int
    minimum: int
    median: float
    maximum: int
    under_sampled: int


@dataclass
class Report(Shown):
    """The whole run.

    bits_per_weight  of the quantized weights, including scales and zero points
    left             linear layer that is kept in float -> the reason
    stages           the effect of each stage
    experts          the calibration tokens of experts, per layer of experts
    sizes            the size of each format in bytes, if there are several
    checksums        the SHA-256 of the files of the model
    request          the SHA-256 of everything that was requested, except the contents of the text
    notes            fallbacks and surprises that a user should know
    verdict          the quality of the finished model; None in a record of an unfinished run, or if it was turned off
    command          the command line of the run; empty if it was started in Python
    forecast         what was expected of the run; None if nobody asked for progress
    further          the reports of the other runs of the same command, if its formats have several grids
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
    experts: list[ExpertTokens] = field(default_factory=list)
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    file_bytes: int = 0
    original_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    request: str = ""
    verdict: Verdict | None = None
    command: str = ""
    forecast: Forecast | None = None
    further: list["Report"] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """The report of a finished run, from its record; unknown keys are ignored."""
        known = {item.name: values[item.name] for item in dataclasses.fields(cls) if item.name in values}
        known["blocks"] = [BlockReport.from_dict(block, resumed=block["resumed"]) for block in values["blocks"]]
        known["tuning"] = TuningReport.from_dict(values["tuning"]) if values["tuning"] else None
        known["stages"] = [StageSummary(**summary) for summary in values["stages"]]
        known["experts"] = [ExpertTokens(**entry) for entry in values["experts"]]
        known["verdict"] = Verdict.from_dict(values["verdict"]) if values.get("verdict") else None
        known["forecast"] = Forecast.from_dict(values["forecast"]) if values.get("forecast") else None
        return cls(**known)

    def take(self, event: object) -> None:
        """Add the reports among the events of the run."""
        if isinstance(event, BlockReport):
            self.blocks.append(event)
        elif isinstance(event, TuningReport):
            self.tuning = event

    @property
    def layers(self) -> list[LayerReport]:
        return [layer for block in self.blocks for layer in block.layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a record has no `further` reports, because each folder has its own."""
        values = dataclasses.asdict(self)
        return values if self.further else {key: value for key, value in values.items() if key != "further"}

    def tables(self) -> Iterator[Table]:
        """The result, and the layers with the largest error."""
        rows = [
            ("layers quantized", str(len(self.layers))),
            ("bits per weight, with scales", f"{self.bits_per_weight:.3f}"),
            ("size of weights", f"{megabytes(self.original_bytes)} → {megabytes(self.file_bytes)}"),
            *((f"size as {name}", megabytes(size)) for name, size in self.sizes.items()),
            *([("tuning", str(self.tuning))] if self.tuning else []),
            ("time", duration(self.seconds)),
        ]
        yield Table(f"{self.source} → {self.output}", rows)
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:LAYERS_SHOWN]
        columns = ("layer with a large error", "grid", "error")
        yield Table("", [(layer.name, layer.scheme, f"{layer.error:.2%}") for layer in worst], columns)
        for report in self.further:
            yield from report.tables()

    def remarks(self) -> list[str]:
        """The notes."""
        return self.notes
