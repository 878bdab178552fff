"""Whether the whole model is tuned, and what is kept in memory meanwhile.

There are as many quantized values as weights, and a token decides few of them. So the whole model is tuned only where
there is text enough, and memory for the state of the quantized values.
"""

from collections.abc import Collection
from dataclasses import dataclass

from llmq import memory
from llmq.methods import Tuning
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Text
from llmq.numerics.layer_plan import LayerPlan
from llmq.steps.run import Run

ROUNDING_BYTES = 6  # per weight: v and Adam's two means of v
SCALE_BYTES = 12  # per group: θ and Adam's two means of θ
MEMORY_SHARE = 2  # packed blocks may take half of the free main memory, and states half of that of the device
REVISIONS = 3  # versions of the packed blocks on disk: the saved best, the current best, the one that is being written
TOO_LITTLE_TEXT = (
    "end-to-end tuning was left out: it pays from {needed:g} tokens per weight, and there are {tokens:.2g}"
)
TOO_LITTLE_MEMORY = "end-to-end tuning was left out: the state of the quantized values does not fit into memory"
READ_EACH_TIME = "the packed blocks did not fit into memory, so each step of end-to-end tuning read them from disk"


@dataclass(frozen=True)
class MemoryPlan:
    """Where hidden states of the validation text are kept, and whether packed blocks are kept in memory."""

    states: Place
    packed_in_memory: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user: what takes longer, and why."""
        return () if self.packed_in_memory else (READ_EACH_TIME,)


def choose(run: Run, text: Text) -> MemoryPlan:
    """The plan for tuning on `text`; after a lack of memory everything is read from disk."""
    if run.economy:
        return MemoryPlan(Place.FILE, packed_in_memory=False)
    hidden = run.skeleton.hidden_bytes(text.length) * text.validation
    states = Storage.choose(hidden, run.skeleton.device, run.writer.activations)
    packed = sum(plan.packed_bytes(scale_bytes=4) for plan in _quantized(run.plans.values()))
    return MemoryPlan(states.place, packed <= memory.spare(memory.HOST) // MEMORY_SHARE)


def left_out(run: Run, text: Text, tuning: Tuning) -> str:
    """Why the whole model is not tuned, for the user; empty if it is."""
    weights = sum(plan.weights for plan in _quantized(run.plans.values()))
    if not _has_enough(text, tuning, weights):
        tokens = text.fitted * text.length / max(1, weights)
        return TOO_LITTLE_TEXT.format(tokens=tokens, needed=tuning.tokens_per_weight)
    states = ROUNDING_BYTES * weights if tuning.rounding else 0
    return TOO_LITTLE_MEMORY if states > memory.spare(run.skeleton.device) // MEMORY_SHARE else ""


def disk_bytes(skeleton: Skeleton, plans: Collection[LayerPlan], tuning: Tuning, text: Text) -> int:
    """The most bytes that tuning stores on disk in addition to the committed blocks."""
    plans = _quantized(plans)
    groups = sum(plan.groups for plan in plans)
    weights = sum(plan.weights for plan in plans)
    if not _has_enough(text, tuning, weights):
        return 0
    states = SCALE_BYTES * groups + (ROUNDING_BYTES * weights if tuning.rounding else 0)
    packed = sum(plan.packed_bytes(scale_bytes=4) for plan in plans)
    return 2 * states + REVISIONS * packed + skeleton.hidden_bytes(text.length) * text.sequences


def _has_enough(text: Text, tuning: Tuning, weights: int) -> bool:
    return text.fitted * text.length >= tuning.tokens_per_weight * weights


def _quantized(plans: Collection[LayerPlan]) -> list[LayerPlan]:
    return [plan for plan in plans if plan.scheme.weights is not None]
