"""Events that a run reports while it works: the basis of progress, logs and the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep


@dataclass(frozen=True)
class TextRead:
    """The calibration text was read: its manifest, and notes about problems."""

    manifest: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """The progress of a stage: `done` of `total` units, such as blocks; `detail` names the last one."""

    stage: str
    done: int
    total: int
    unit: str = "blocks"
    detail: str = ""


Event = TextRead | Progress | LayerReport | BlockReport | TuningStep | TuningReport
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers that do not need events."""
