"""Events that a job reports while it works: the basis of progress, logs and the report.

A step reports an amount of work that it has done, and knows nothing about bars. `Planned` comes first and has what
each stage is expected to cost, so that `timeline.py` can tell how much of the whole job is done and how long the rest
will take.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep

# The stages of `llmq quantize`. Those without an event `Progress`: quantizing reports layers and blocks, tuning steps.
PROBE, MEASURING, WRITTEN = "float model checked", "layers measured", "text written by the model"
WEIGHTING, TRANSFORMS, QUANTIZING = "token weights", "transforms", "quantizing"
BLOCK_TUNING, TUNING, SAVING = "block tuning", "tuning", "saving"
# Then the verdict: models that are read block by block, the scores of all tokens, and text that both models generate.
ORIGINAL, FINISHED, NEAREST = "the original", "the quantized model", "round to nearest"
SCORING, CONTINUING = "scoring", "text continued"


def evaluating(model: str) -> str:
    """The stage in which a text goes through the blocks of `model`."""
    return f"evaluating {model}"


@dataclass(frozen=True)
class Planned:
    """The stages of a job, in order, and the expected time of each.

    in_seconds  whether times are in seconds; otherwise only their ratios have a meaning
    blocks  of "quantizing": the expected seconds of each block, by its path
    layers  the same for each group of layers that are finished together, by the name of the first one
    tokens  that go through each block
    host_bytes, device_bytes  expected peak memory, in main memory and on a GPU; 0 if unknown
    """

    stages: Mapping[str, float]
    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    in_seconds: bool = False
    host_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True)
class TextRead:
    """The calibration text was read: its manifest, and notes about problems."""

    manifest: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """The progress of a stage: `done` of `total` units, such as blocks; `detail` names the last one.

    share  of the work of the stage that is done, if the units differ in work
    """

    stage: str
    done: int
    total: int
    unit: str = "blocks"
    detail: str = ""
    share: float | None = None


Event = Planned | TextRead | Progress | LayerReport | BlockReport | TuningStep | TuningReport
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers that do not need events."""
