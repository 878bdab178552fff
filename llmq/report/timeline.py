"""How much of a job is done, and how long the rest will take, from its events.

The plan of the job gives each stage its expected seconds. An event reports how much of a stage is done; the time since
the event before it belongs to this stage. So for each stage there are the expected and the measured seconds of the
work done so far. Their ratio corrects the expected seconds of the rest:

    rest of a stage = expected seconds of the rest * ratio of the stage,    drawn towards the ratio of all stages

Stages may alternate, as quantizing and block tuning do in each block. A block that an interrupted run has finished
counts as done, but not as measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from llmq.report.events import BLOCK_TUNING, QUANTIZING, TUNING, Event, OnEvent, Planned, Progress
from llmq.report.forecast import Forecast, StageTime
from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep

LITTLE = 0.02  # of the expected work: less says little about the speed
PRIOR = 0.03  # of the expected work: so much weight has the plan against the measured speed
SHORT = 0.3  # seconds of expected work: so much weight at least, because the first calls of a program are slow


@dataclass
class Stage:
    """A stage in seconds.

    expected   of the whole stage
    done       expected seconds of the work that is done
    skipped    the part of `done` that an interrupted run had done
    spent      measured seconds
    position   what is done, as a person counts it: `done` of `total` `unit`
    """

    expected: float
    done: float = 0.0
    skipped: float = 0.0
    spent: float = 0.0
    position: str = ""

    @property
    def measured(self) -> float:
        """The expected seconds of the work that took the measured seconds."""
        return self.done - self.skipped


class Timeline:
    """Takes the events of a job in order. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._blocks_done: list[str] = []
        self._plan = Planned({})
        self._in_block = 0.0  # expected seconds of the layers of the current block that are quantized
        self.stages: dict[str, Stage] = {}
        self.current = ""  # the name of the stage of the last event
        self.rate: float | None = None  # tokens per second through the last block

    def before(self, on_event: OnEvent) -> OnEvent:
        """`on_event`, after this timeline has taken the event."""

        def taken(event: Event) -> None:
            self.take(event)
            on_event(event)

        return taken

    def take(self, event: Event) -> None:
        """Account for one event."""
        if isinstance(event, Planned):
            self._plan, self.current, self._blocks_done, self._in_block = event, "", [], 0.0
            self.stages = {name: Stage(seconds) for name, seconds in event.stages.items()}
            self._last = self._clock()
        elif isinstance(event, Progress):
            share = event.done / max(1, event.total) if event.share is None else event.share
            self._advance(event.stage, share, f"{event.done}/{event.total} {event.unit}")
        elif isinstance(event, LayerReport):
            self._in_block += self._plan.layers.get(event.name, 0.0)
            self._advance_blocks()
        elif isinstance(event, BlockReport):
            self._finish_block(event)
        elif isinstance(event, TuningStep):
            self._advance(TUNING, event.step / max(1, event.steps), f"{event.step}/{event.steps} steps")
        elif isinstance(event, TuningReport):
            self._advance(TUNING, 1.0, "")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def forecast(self) -> Forecast | None:
        """The expected and the measured seconds of each stage so far; None without a plan in seconds."""
        if not self._plan.in_seconds:
            return None
        stages = [StageTime(name, stage.measured, stage.spent) for name, stage in self.stages.items() if stage.spent]
        return Forecast(tuple(stages), self._plan.host_bytes, self._plan.device_bytes)

    @property
    def remaining(self) -> float | None:
        """Expected seconds until the end; None as long as too little is known."""
        stages = list(self.stages.values())  # at once: a bar asks from another thread
        total = sum(stage.expected for stage in stages)
        large = [stage for stage in stages if stage.expected >= LITTLE * total > 0]
        measured, spent = sum(stage.measured for stage in large), sum(stage.spent for stage in large)
        if not total or (measured < LITTLE * total and not self._plan.in_seconds):
            return None
        common, drawn = self._common_ratio(measured, spent, total), LITTLE * total
        if self._plan.in_seconds:
            drawn = max(drawn, SHORT)
        rest = 0.0
        for stage in large:
            ratio = (stage.spent + common * drawn) / (stage.measured + drawn)
            left = ratio * (stage.expected - stage.done)
            waited = self._clock() - self._last if stage is self.stages.get(self.current) else 0.0
            rest += max(0.0, left - waited)
        return rest

    def _common_ratio(self, measured: float, spent: float, total: float) -> float:
        """Measured / expected seconds of the finished work; drawn towards 1 if the plan knows seconds."""
        if measured <= 0 or spent <= 0:
            return 1.0
        prior = max(PRIOR * total, SHORT) if self._plan.in_seconds else 0.0
        return float((spent / measured) ** (measured / (measured + prior)))

    @property
    def fraction(self) -> float:
        """The part of the whole job that is done, from 0 to 1, in expected seconds."""
        stages = list(self.stages.values())
        total = sum(stage.expected for stage in stages)
        return sum(stage.done for stage in stages) / total if total else 0.0

    @property
    def position(self) -> str:
        """What is done of the current stage, such as `3/32 blocks`."""
        stage = self.stages.get(self.current)
        return "" if stage is None else stage.position

    def _finish_block(self, block: BlockReport) -> None:
        if block.path in self._blocks_done:  # a run out of memory starts again, and restores finished blocks
            return
        share = self._share(block.path)
        if block.resumed and self.stages:
            quantizing = self._stage(QUANTIZING)
            quantizing.skipped += share * quantizing.expected
            if BLOCK_TUNING in self.stages:
                tuning = self.stages[BLOCK_TUNING]
                tuning.skipped += tuning.expected / max(1, len(self._plan.blocks))
                tuning.done += tuning.expected / max(1, len(self._plan.blocks))
        elif self._plan.tokens and block.seconds:
            self.rate = self._plan.tokens / block.seconds
        self._in_block = 0.0
        self._blocks_done.append(block.path)
        self._advance_blocks(elapsed_counts=not block.resumed)

    def _share(self, path: str) -> float:
        """A block's part of "quantizing"."""
        together = sum(self._plan.blocks.values())
        return self._plan.blocks.get(path, 0.0) / together if together else 0.0

    def _advance_blocks(self, *, elapsed_counts: bool = True) -> None:
        together = sum(self._plan.blocks.values())
        finished = sum(self._share(path) for path in self._blocks_done)
        part = self._in_block / together if together else 0.0
        position = f"{len(self._blocks_done)}/{len(self._plan.blocks)} blocks" if self._plan.blocks else ""
        self._advance(QUANTIZING, finished + part, position, elapsed_counts=elapsed_counts)

    def _stage(self, name: str) -> Stage:
        """A stage that the plan does not have is expected to cost nothing."""
        return self.stages.setdefault(name, Stage(0.0))

    def _advance(self, name: str, fraction: float, position: str, *, elapsed_counts: bool = True) -> None:
        now, stage = self._clock(), self._stage(name)
        done = min(1.0, fraction) * stage.expected
        moved = done > stage.done or not stage.expected
        if elapsed_counts:
            (stage if moved or not self.current else self.stages[self.current]).spent += now - self._last
        stage.done, stage.position = max(done, stage.done), position
        self._last, self.current = now, name
