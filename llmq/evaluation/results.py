"""The results of an evaluation as plain values: what `llmq eval --json` prints."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llmq.evaluation.bootstrap import FEW_DOCUMENTS
from llmq.evaluation.overlap import CalibrationText
from llmq.evaluation.summary import Evaluation
from llmq.evaluation.trajectories import Trajectories
from llmq.report.shown import Shown, Table


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors; bits per packed weight, including scales and zero points, None for a float model."""

    file_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class Documents:
    """The documents of a text, in its order; two models measured on the same text can be compared with them.

    unit    "documents", or "sequences" if the text has no documents (`texts.py`)
    tokens  the number of tokens of each
    kl      the mean KL divergence of each in nats per token; None without an original
    """

    unit: str
    tokens: tuple[int, ...]
    kl: tuple[float, ...] | None = None

    def __str__(self) -> str:
        few = " (few)" if 1 < len(self.tokens) < FEW_DOCUMENTS else ""
        return f"{len(self.tokens)} {self.unit}{few}"


@dataclass(frozen=True)
class Figures:
    """The results for one text, or for all texts together.

    text       the name of the text
    source     its file or dataset; empty for all texts together
    documents  None for all texts together, and for floors
    overlap    the share of the text's 13-grams of tokens that the calibration text contains; None if that is not known
    """

    text: str
    windows: int
    model: Evaluation
    original: Evaluation | None = None
    source: str = ""
    documents: Documents | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Floor:
    """The original compared with itself, computed in another way: a smaller distance of a model means nothing.

    name          what was changed, such as "bfloat16"
    trajectories  None unless they were requested
    """

    name: str
    texts: tuple[Figures, ...]
    total: Figures
    trajectories: Trajectories | None = None


@dataclass(frozen=True)
class Measurement(Shown):
    """The results for a model, and for the original that it was compared with.

    activations   how the inputs of the model's linear layers were quantized, in words; "none" if they were not
    floors        the original compared with itself; empty unless they were requested
    trajectories  None unless they were requested
    calibration   the text that the model was calibrated on, as far as it is known
    """

    texts: tuple[Figures, ...]
    total: Figures
    seqlen: int
    size: Size
    original_size: Size | None = None
    notes: tuple[str, ...] = ()
    activations: str = "none"
    floors: tuple[Floor, ...] = ()
    trajectories: Trajectories | None = None
    calibration: CalibrationText = CalibrationText()

    def tables(self) -> Iterator[Table]:
        """The figures of each text, and of all texts together."""
        listed = [*self.texts, *([self.total] if len(self.texts) > 1 else [])]
        names = ["perplexity"]
        if self.original is not None:
            names += ["perplexity, original", "KL mean", "same top-1"]
        rows = []
        for figures in listed:
            model, original = figures.model, figures.original
            row = [figures.text, f"{model.perplexity:.4f}"]
            if original is not None:
                row += [f"{original.perplexity:.4f}", f"{model.kl_mean:.5f}", f"{model.same_top_1:.2%}"]
            rows.append(row)
        yield Table(f"sequences of {self.seqlen} tokens", rows, ("text", *names))

    def remarks(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    @property
    def model(self) -> Evaluation:
        """The model's figures on all texts together."""
        return self.total.model

    @property
    def original(self) -> Evaluation | None:
        """The original's figures on all texts together."""
        return self.total.original

    @property
    def worst(self) -> Figures | None:
        """The text with the highest mean KL divergence; None without an original, or for one text."""
        if self.original is None or len(self.texts) < 2:
            return None
        return max(self.texts, key=lambda figures: math.inf if figures.model.kl_mean is None else figures.model.kl_mean)

    def to_dict(self) -> dict[str, Any]:
        """The total's entries (text, windows, model, original, …), the name of the worst text, and the other fields."""
        values = asdict(self)
        worst = self.worst
        return {**values.pop("total"), **values, "worst": None if worst is None else worst.text}
