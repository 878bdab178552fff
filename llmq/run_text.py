"""The text of a run: the calibration text, and text that the model generates in addition."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import calibration, memory
from llmq.calibration import CalibrationSet, OwnText, SelfAuthor
from llmq.calibration.documents import Contents
from llmq.calibration.sequences import require_embeddings
from llmq.calibration.sources import without_folder
from llmq.errors import CalibrationError
from llmq.model.passes.streams import Text
from llmq.report.events import WRITTEN, OnEvent, Progress, TextRead, ignore
from llmq.report.record import Report
from llmq.run_plan import Plan
from llmq.runtime.load import load_tokenizer
from llmq.source_names import parse_sources

FEWEST_TOKENS = 128  # with fewer, every method was sometimes worse than rtn (scripts/odd_runs.py)
TOKENS_PER_INPUT = 50  # with fewer tokens, statistics of the text generalize badly to other text
ADDED_SEED = 1 << 32  # so that this text differs from that of `--calibration self`
OWN_TEXT = "calibrated on {} sequences of the given text, and {} that the model wrote (not with --no-own-text)"
NO_TEXT = (
    "no text was given; add --calibration FILE to quantize, or measure the model with "
    "llmq eval OUT --against MODEL --text FILE"
)
ALL_READ = (
    "calibration used the whole text; give more text or fewer --samples, or measure the model with "
    "llmq eval OUT --against MODEL --text FILE"
)


@dataclass(frozen=True)
class HeldBack:
    """The text on which the finished model is measured.

    windows  (V, T) int64; None if there is no such text
    about    what the text is, or why there is none; empty if the measurement is turned off
    """

    windows: Tensor | None
    about: str = ""


class RunText:
    """Reads the text, or lets the model generate it; generated text is kept in the staging folder of the run."""

    def __init__(
        self, staging: Path, model_id: str, *, remote_code: bool, given: Mapping[str, Contents] | None = None
    ) -> None:
        self._own, self._own_added = OwnText(staging, model_id), OwnText(staging, model_id, "added")
        self._remote_code, self._given = remote_code, given

    def load(self, plan: Plan, report: Report, on_event: OnEvent) -> CalibrationSet:
        """The calibration text; notes for the user are added to the report."""
        if plan.importance is not None and not plan.settings.calibration.sources:
            raise CalibrationError(
                f"{plan.importance.path} is an importance matrix and holds no text", hint="give text with --calibration"
            )
        tokenizer = load_tokenizer(plan.checkpoint.folder, remote_code=self._remote_code)
        text = calibration.load(
            plan.settings.calibration,
            tokenizer,
            seed=plan.settings.seed,
            max_tokens=plan.skeleton.max_tokens,
            author=self._author(plan, tokenizer, self._own, on_event),
            given=self._given,
        )
        if plan.stages.needs_calibration and text.windows.numel() < FEWEST_TOKENS:
            raise CalibrationError(
                f"the calibration text has {text.windows.numel()} tokens, expected at least {FEWEST_TOKENS}",
                hint="give more text, or a larger --samples or --seqlen; the method rtn reads no text",
            )
        text = _with_note(text, plan)
        report.calibration = text.to_dict()
        report.notes += text.notes
        on_event(TextRead(text.to_dict(), text.notes))
        if plan.stages.tuning is not None and len(text.windows) < 2:
            raise CalibrationError(
                "the calibration text has one sequence, but tuning needs at least two: one to tune on, one to validate",
                hint="give more text, a shorter --seqlen, or a method without tuning",
            )
        return text

    def complete(self, windows: Tensor, plan: Plan, report: Report, on_event: OnEvent) -> Text:
        """The text that goes through the blocks: what the model generates, then `windows` (S, T) int64.

        If the model generates text in place of given text, the first of these windows are left out. The last ones are
        for validation.
        """
        tokens, (S, T), stages = windows, windows.shape, plan.stages
        if stages.written:
            tokenizer = load_tokenizer(plan.checkpoint.folder, remote_code=self._remote_code)
            author, read = self._author(plan, tokenizer, self._own_added, on_event), stages.read_of(S)
            seed = plan.settings.seed + ADDED_SEED
            written = author.write(stages.written * read, T, seed, or_nothing=stages.given < 1)
            report.notes += author.notes
            if len(written):
                windows = windows[-read:]
                report.notes.append(OWN_TEXT.format(len(windows), len(written)))
            tokens = torch.cat([written, windows])
        validation = _validation_sequences(plan, S)
        if plan.stages.validation and not validation:
            report.notes.append(
                "one calibration sequence leaves none for validation: no stage was checked on other text"
            )
        return Text(tokens, sequences_at_once(windows, plan.device), validation)

    def held_back(self, plan: Plan, text: CalibrationSet | None, report: Report) -> "HeldBack":
        """The text on which the model of `report` is measured; `text` is the calibration text if it was read."""
        if text is None and report.calibration is not None:
            text = self.load(plan, replace(report, notes=[]), ignore)
        wanted = plan.settings.calibration.held_back
        if not wanted:
            return HeldBack(None)
        if text is None and not plan.settings.calibration.sources:
            return HeldBack(None, NO_TEXT)
        if text is None:
            alone = plan.settings.calibration.replace(samples=wanted, validation=0)
            tokenizer = load_tokenizer(plan.checkpoint.folder, remote_code=self._remote_code)
            if all(source.is_self for source in parse_sources(alone.sources)):
                return HeldBack(None, NO_TEXT)
            text = calibration.load(alone, tokenizer, seed=plan.settings.seed, max_tokens=plan.skeleton.max_tokens)
            require_embeddings(text.windows, plan.skeleton.vocabulary)
            return HeldBack(text.windows, f"{_size(text.windows)} of {_names(text)}")
        if len(text.held_back):
            require_embeddings(text.held_back, plan.skeleton.vocabulary)
            return HeldBack(text.held_back, f"{_size(text.held_back)} of {_names(text)} that calibration did not read")
        checked = _validation_sequences(plan, len(text.windows))
        if checked:
            windows = text.windows[-checked:]
            return HeldBack(
                windows, f"{_size(windows)} of the calibration text on which stages were checked, not fitted"
            )
        return HeldBack(None, ALL_READ)

    def save(self) -> None:
        """Save the generated text in the staging folder, which must exist."""
        self._own.save()
        self._own_added.save()

    def _author(self, plan: Plan, tokenizer: Any, kept: OwnText, on_event: OnEvent) -> SelfAuthor:
        def progress(done: int, total: int) -> None:
            on_event(Progress(WRITTEN, done, total, "tokens"))

        return SelfAuthor(plan.skeleton, tokenizer, kept, on_progress=progress)


def _validation_sequences(plan: Plan, sequences: int) -> int:
    """The number of calibration sequences, the last ones, on which stages are checked and nothing is fitted."""
    share = plan.stages.validation
    return min(max(math.ceil(share * sequences), plan.stages.tuning is not None), sequences - 1)


def _names(text: CalibrationSet) -> str:
    return ", ".join(map(without_folder, text.sources))


def _size(windows: Tensor) -> str:
    return f"{len(windows)} sequence{'s' if len(windows) > 1 else ''} of {windows.shape[1]} tokens"


def sequences_at_once(windows: Tensor, device: torch.device) -> int:
    """The number of sequences that go through a block together, for `windows` (S, T)."""
    return max(1, memory.TOKENS_PER_BATCH_TO_QUANTIZE.get(device.type, 4096) // windows.shape[1])


def _with_note(text: CalibrationSet, plan: Plan) -> CalibrationSet:
    """`text`, with a note if it is short for the widest layer. Raises CheckpointError for ids without an embedding."""
    require_embeddings(text.windows, plan.skeleton.vocabulary)
    widest = max(layer.in_features for layer in plan.layers.values() if layer.scheme.weights is not None)
    if text.windows.numel() < TOKENS_PER_INPUT * widest:
        few = (
            f"{text.windows.numel()} calibration tokens are few for layers with {widest} inputs, "
            f"at least {TOKENS_PER_INPUT * widest} are recommended; see --samples and --seqlen"
        )
        return replace(text, notes=(*text.notes, few))
    return text
