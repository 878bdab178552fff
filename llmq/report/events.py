"""What a run reports while it goes on: progress, logs and the report are made of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep


@dataclass(frozen=True)
class TextRead:
    """The calibration text was read; `manifest` says what it consists of, `notes` what a user should know of it."""

    manifest: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` units, such as blocks or weights; `detail` names the one just done."""

    stage: str
    done: int
    total: int
    unit: str = "blocks"
    detail: str = ""


Event = TextRead | Progress | LayerReport | BlockReport | TuningStep | TuningReport
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers that do not ask for events."""
