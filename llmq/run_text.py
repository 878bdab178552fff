"""The texts of a run: what the model is watched on, and what it is tuned on where that is another one."""

from pathlib import Path

from torch import Tensor

from llmq import calibration
from llmq.calibration import CalibrationSet, OwnText, SelfAuthor
from llmq.errors import CheckpointError
from llmq.plan import Plan
from llmq.report.record import Report
from llmq.runtime.load import load_tokenizer
from llmq.steps import end_to_end

TOKENS_PER_INPUT = 50  # below that, what is measured on the text says little about other text
TUNING_SEED = 1 << 32  # what the model writes to be tuned on is not what it may have written for calibration


class RunText:
    """Reads the text, or has the model write it; what the model wrote is kept in the run's staging.

    tuned_on  the windows (S, T) of end-to-end tuning, once `load` has seen that there is to be any
    """

    def __init__(self, staging: Path, model_id: str, *, remote_code: bool) -> None:
        self.tuned_on: Tensor | None = None
        self._own, self._tuning = OwnText(staging, model_id), OwnText(staging, model_id, "tuning")
        self._remote_code = remote_code

    def load(self, plan: Plan, report: Report) -> CalibrationSet:
        """The calibration text; what is to be known of it goes into the report."""
        tokenizer = load_tokenizer(plan.checkpoint.folder, remote_code=self._remote_code)
        text = calibration.load(
            plan.settings.calibration,
            tokenizer,
            seed=plan.settings.seed,
            max_tokens=plan.skeleton.max_tokens,
            author=SelfAuthor(plan.skeleton, tokenizer, self._own),
        )
        report.calibration = text.to_dict()
        report.notes += text.notes
        _check_tokens(text, plan, report)
        if plan.stages.tuning is not None:
            writer = SelfAuthor(plan.skeleton, tokenizer, self._tuning)
            self.tuned_on = end_to_end.text(plan.stages, text.windows, writer, plan.settings.seed + TUNING_SEED)
            report.notes += writer.notes
        return text

    def save(self) -> None:
        """Keep what the model wrote; the staging must be there."""
        self._own.save()
        self._tuning.save()


def _check_tokens(text: CalibrationSet, plan: Plan, report: Report) -> None:
    """Refuse ids that the model has no embedding for; say where the text is too short for what it is to tell."""
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
