"""The texts of a run: the calibration text, and the text of end-to-end tuning."""

from pathlib import Path
from typing import Any

import torch

from llmq import calibration
from llmq.calibration import CalibrationSet, OwnText, SelfAuthor
from llmq.calibration.sequences import require_embeddings
from llmq.model.passes.streams import Text
from llmq.plan import Plan
from llmq.report.events import OnEvent, Progress, TextRead
from llmq.report.record import Report
from llmq.runtime.load import load_tokenizer
from llmq.steps.end_to_end import tuning_text

TOKENS_PER_INPUT = 50  # with fewer tokens, statistics of the text generalize badly to other text
TUNING_SEED = 1 << 32  # so that the text generated for tuning differs from text generated for calibration


class RunText:
    """Reads the text, or lets the model generate it; generated text is kept in the staging folder of the run.

    tuning  the text of end-to-end tuning; None before `load`, and for methods without tuning
    """

    def __init__(self, staging: Path, model_id: str, *, remote_code: bool) -> None:
        self.tuning: Text | None = None
        self._own, self._own_tuning = OwnText(staging, model_id), OwnText(staging, model_id, "tuning")
        self._remote_code = remote_code

    def load(self, plan: Plan, report: Report, on_event: OnEvent) -> CalibrationSet:
        """The calibration text; notes for the user are added to the report."""
        tokenizer = load_tokenizer(plan.checkpoint.folder, remote_code=self._remote_code)
        text = calibration.load(
            plan.settings.calibration,
            tokenizer,
            seed=plan.settings.seed,
            max_tokens=plan.skeleton.max_tokens,
            author=self._author(plan, tokenizer, self._own, on_event),
        )
        report.calibration = text.to_dict()
        report.notes += text.notes
        _check_tokens(text, plan, report)
        on_event(TextRead(text.to_dict(), text.notes))
        if plan.stages.tuning is not None:
            author = self._author(plan, tokenizer, self._own_tuning, on_event)
            S, T = text.windows.shape
            nothing_written = torch.empty(0, T, dtype=torch.int64)
            tuning_text(plan.stages, nothing_written, text.windows)  # raises before text is generated for hours
            written = author.write(plan.stages.tuning.written * S, T, plan.settings.seed + TUNING_SEED)
            self.tuning = tuning_text(plan.stages, written, text.windows)
            report.notes += author.notes
        return text

    def save(self) -> None:
        """Save the generated text in the staging folder, which must exist."""
        self._own.save()
        self._own_tuning.save()

    def _author(self, plan: Plan, tokenizer: Any, kept: OwnText, on_event: OnEvent) -> SelfAuthor:
        def progress(done: int, total: int) -> None:
            on_event(Progress("text written by the model", done, total, "tokens"))

        return SelfAuthor(plan.skeleton, tokenizer, kept, on_progress=progress)


def _check_tokens(text: CalibrationSet, plan: Plan, report: Report) -> None:
    """Raise CheckpointError for ids without an embedding; add a note if the text is short for the widest layer."""
    require_embeddings(text.windows, plan.skeleton.vocabulary)
    widest = max(layer.in_features for layer in plan.layers.values() if layer.scheme.weights is not None)
    if text.windows.numel() < TOKENS_PER_INPUT * widest:
        report.notes.append(
            f"{text.windows.numel()} calibration tokens are few for layers with {widest} inputs, "
            f"at least {TOKENS_PER_INPUT * widest} are recommended; see --samples and --seqlen"
        )
