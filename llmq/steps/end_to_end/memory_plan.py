"""What end-to-end tuning tunes, and what is kept in memory and what on disk.

Scales are always tuned. Quantized values are tuned where their state fits into memory, and where there is enough text:
a weight has as many quantized values as it has weights, and a token decides few of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmq import memory
from llmq.algorithms.kl_tuning import Rates
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
    "end-to-end tuning changed scales only: {tokens:.2g} tokens per weight is less than the {needed:g} at which tuning "
    "quantized values pays"
)
TOO_LITTLE_MEMORY = "end-to-end tuning changed scales only: the state of quantized values does not fit into memory"
READ_EACH_TIME = "the packed blocks did not fit into memory, so each step of end-to-end tuning read them from disk"


@dataclass(frozen=True)
class MemoryPlan:
    """Where the hidden states of the float model are kept; whether packed blocks are kept in memory; what is tuned.

    limits  why quantized values are not tuned although the method does so; empty if they are
    notes   for the user: the limits, and what takes longer
    """

    states: Place
    packed_in_memory: bool
    rates: Rates
    limits: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.limits, *(() if self.packed_in_memory else (READ_EACH_TIME,)))


def choose(run: Run, text: Text, tuning: Tuning, limits: Sequence[str] | None = None) -> MemoryPlan:
    """The plan for tuning on `text`; an interrupted run continues with its `limits`, whatever memory is free now."""
    skeleton, plans = run.skeleton, _quantized(run.plans.values())
    if limits is None:
        limits = _limits(skeleton, sum(plan.weights for plan in plans), text, tuning)
    states = Storage.choose(
        skeleton.hidden_bytes(text.length) * text.sequences, skeleton.device, run.writer.activations
    )
    packed = sum(plan.packed_bytes(scale_bytes=4) for plan in plans)
    fits = packed <= memory.spare(memory.HOST) // MEMORY_SHARE
    return MemoryPlan(states.place, fits, Rates(0.0 if limits else tuning.rounding, tuning.scales), tuple(limits))


def _limits(skeleton: Skeleton, weights: int, text: Text, tuning: Tuning) -> list[str]:
    if not tuning.rounding:
        return []
    tokens = text.fitted * text.length / max(1, weights)
    if tokens < tuning.tokens_per_weight:
        return [TOO_LITTLE_TEXT.format(tokens=tokens, needed=tuning.tokens_per_weight)]
    fits = ROUNDING_BYTES * weights <= memory.spare(skeleton.device) // MEMORY_SHARE
    return [] if fits else [TOO_LITTLE_MEMORY]


def disk_bytes(skeleton: Skeleton, plans: Collection[LayerPlan], tuning: Tuning, text: Text) -> int:
    """The most bytes that tuning stores on disk in addition to the committed blocks."""
    plans = _quantized(plans)
    groups = sum(plan.groups for plan in plans)
    weights = sum(plan.weights for plan in plans)
    tunes_codes = tuning.rounding > 0 and text.fitted * text.length >= tuning.tokens_per_weight * weights
    states = SCALE_BYTES * groups + (ROUNDING_BYTES * weights if tunes_codes else 0)
    packed = sum(plan.packed_bytes(scale_bytes=4) for plan in plans)
    return 2 * states + REVISIONS * packed + skeleton.hidden_bytes(text.length) * text.sequences


def _quantized(plans: Collection[LayerPlan]) -> list[LayerPlan]:
    return [plan for plan in plans if plan.scheme.weights is not None]
