"""The result of a training: the loss on training text and on held-out text, and what the finished file is worth."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmq.report.shown import Shown, Table, duration

UNITS = {"kl": "KL divergence in nats per token", "cross-entropy": "cross-entropy in nats per token"}


@dataclass(frozen=True)
class Losses:
    """The losses of a training at one step.

    training  mean over the steps since the last entry; None before the first step
    held_out  on text on which nothing is trained
    """

    step: int
    training: float | None
    held_out: float


@dataclass(frozen=True)
class Quality:
    """A file measured on the held-out text; `kl` and `same_top1` are None without an original to compare with."""

    perplexity: float
    kl: float | None = None
    same_top1: float | None = None


@dataclass(frozen=True)
class TrainingReport(Shown):
    """One training.

    start, original   the quantized model that it started from, and the float model; None without one
    text, settings    plain values, see `training/text.py` and `training/settings.py`
    history           the losses, from step 0
    moved             fraction of the quantized values that changed
    before, after     quality of the start and of the trained file on held-out text
    kept              whether the trained values were kept; otherwise the output holds the start
    seconds           of the steps that this process did, and of the measurement
    """

    source: str
    output: str
    start: str
    original: str | None
    text: Mapping[str, Any]
    settings: Mapping[str, Any]
    history: tuple[Losses, ...]
    moved: float
    before: Quality
    after: Quality
    kept: bool
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The outcome, for people."""
        loss = str(self.settings["loss"])
        name = "KL" if loss == "kl" else "perplexity"
        before, after = (figures.kl if loss == "kl" else figures.perplexity for figures in (self.before, self.after))
        change = f"{name} on held-out text {before:.5f} → {after:.5f}"
        steps = f"{self.settings['steps']} steps"
        if self.kept:
            return f"trained for {steps}: {change}, {self.moved:.1%} of the quantized values changed"
        return f"the training was undone: after {steps} the model was worse than its start ({change})"

    def tables(self) -> Iterator[Table]:
        """The losses side by side, and the quality of the files."""
        rows = [
            (str(entry.step), "-" if entry.training is None else f"{entry.training:.5f}", f"{entry.held_out:.5f}")
            for entry in self.history
        ]
        yield Table(UNITS[str(self.settings["loss"])], rows, ("step", "training text", "held-out text"))
        figures = [
            (name, "-" if own.kl is None else f"{own.kl:.5f}", f"{own.perplexity:.4f}",
             "-" if own.same_top1 is None else f"{own.same_top1:.2%}")
            for name, own in (("start", self.before), ("trained", self.after))
        ]  # fmt: skip
        yield Table("files on held-out text", figures, ("", "KL mean", "perplexity", "same top-1"))
        yield Table(f"{self.source} → {self.output}", [("outcome", self.sentence), ("time", duration(self.seconds))])

    def remarks(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingReport":
        history = tuple(Losses(**entry) for entry in values["history"])
        quality = {name: Quality(**values[name]) for name in ("before", "after")}
        return cls(**{**values, "history": history, "notes": tuple(values["notes"]), **quality})
