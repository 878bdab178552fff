"""The texts of a run: what is fitted on, and what is tuned on where that is another one."""

from pathlib import Path
from typing import Any

import torch

from llmq import calibration
from llmq.calibration import CalibrationSet, OwnText, SelfAuthor
from llmq.errors import CheckpointError
from llmq.model.passes.streams import Text
from llmq.plan import Plan
from llmq.report.events import OnEvent, Progress, TextRead
from llmq.report.record import Report
from llmq.runtime.load import load_tokenizer
from llmq.steps.end_to_end import tuning_text

TOKENS_PER_INPUT = 50  # below that, what is measured on the text says little about other text
TUNING_SEED = 1 << 32  # what the model writes for tuning differs from what it may have written for calibration


class RunText:
    """Reads the text, or has the model write it; what the model wrote is kept in the run's staging.

    tuning  the text of end-to-end tuning, once `load` has seen that there is any
    """

    def __init__(self, staging: Path, model_id: str, *, remote_code: bool) -> None:
        self.tuning: Text | None = None
        self._own, self._own_tuning = OwnText(staging, model_id), OwnText(staging, model_id, "tuning")
        self._remote_code = remote_code

    def load(self, plan: Plan, report: Report, on_event: OnEvent) -> CalibrationSet:
        """The calibration text; what a user should know of it goes into the report."""
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
            tuning_text(
                plan.stages, torch.empty(0, T, dtype=torch.int64), text.windows
            )  # raises before hours are spent
            written = author.write(plan.stages.tuning.written * S, T, plan.settings.seed + TUNING_SEED)
            self.tuning = tuning_text(plan.stages, written, text.windows)
            report.notes += author.notes
        return text

    def save(self) -> None:
        """Keep what the model wrote; the staging must be there."""
        self._own.save()
        self._own_tuning.save()

    def _author(self, plan: Plan, tokenizer: Any, kept: OwnText, on_event: OnEvent) -> SelfAuthor:
        def progress(done: int, total: int) -> None:
            on_event(Progress("text written by the model", done, total, "tokens"))

        return SelfAuthor(plan.skeleton, tokenizer, kept, on_progress=progress)


def _check_tokens(text: CalibrationSet, plan: Plan, report: Report) -> None:
    """Refuse ids that the model has no embedding for; note where the text is short for the widest layer."""
    known = plan.skeleton.vocabulary
    largest = int(text.windows.max())
    if largest >= known:
        raise CheckpointError(
            f"the tokenizer made the id {largest}, and the model has embeddings for {known} tokens",
            hint="is the tokenizer the one that belongs to the model?",
        )
    widest = max(layer.in_features for layer in plan.layers.values() if layer.scheme.weights is not None)
    if text.windows.numel() < TOKENS_PER_INPUT * widest:
        report.notes.append(
            f"{text.windows.numel()} calibration tokens are few for layers of {widest} inputs, "
            f"{TOKENS_PER_INPUT * widest} or more tell reliably what matters; see --samples and --seqlen"
        )
