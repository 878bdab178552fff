"""How far a job is and how long the rest takes, from events at known times."""

import io
import sys

import pytest

from llmq.report import bar
from llmq.report.events import Event, Planned, Progress, ignore
from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep
from llmq.report.timeline import Timeline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def layer(name: str) -> LayerReport:
    return LayerReport(name, "int4", 4.0, 0.1)


def job(speed: dict[str, float]) -> list[tuple[float, Event]]:
    """Seconds before each event of a job of 100 expected seconds, whose stages take `speed` times as long."""
    plan = Planned(
        {"float model checked": 1, "quantizing": 40, "block tuning": 40, "tuning": 19},
        {"b.0": 20, "b.1": 20},
        {"b.0.q": 5, "b.1.q": 5, "b.0.o": 10, "b.1.o": 10},
        in_seconds=True,
    )
    events: list[tuple[float, Event]] = [(0, plan), (1, Progress("float model checked", 2, 2))]
    for index in range(2):
        quantizing, tuning = speed["quantizing"], speed["block tuning"]
        events += [(5 * quantizing, layer(f"b.{index}.q")), (10 * quantizing, layer(f"b.{index}.o"))]
        events.append((0, Progress("block tuning", 0, 4, "steps", share=index / 2)))
        events += [
            (5 * tuning, Progress("block tuning", step, 4, "steps", share=(4 * index + step) / 8))
            for step in range(1, 5)
        ]
        events.append((5 * quantizing, BlockReport(f"b.{index}", (), seconds=1.0)))
    events += [(1.9 * speed["tuning"], TuningStep(step, 10)) for step in range(1, 11)]
    return [*events, (0, TuningReport(10, 1, ()))]


@pytest.mark.parametrize(
    "speed",
    [
        {"quantizing": 1, "block tuning": 1, "tuning": 1},
        {"quantizing": 5, "block tuning": 5, "tuning": 5},
        {"quantizing": 0.4, "block tuning": 0.4, "tuning": 0.4},
        {"quantizing": 2, "block tuning": 3, "tuning": 2.5},
    ],
)
def test_the_total_is_right_within_thirty_per_cent_from_a_tenth_on(speed: dict[str, float]) -> None:
    clock = Clock()
    timeline, predictions = Timeline(clock), []
    fractions = []
    for seconds, event in job(speed):
        clock.now += seconds
        timeline.take(event)
        assert timeline.remaining is not None
        predictions.append((clock.now, clock.now + timeline.remaining))
        fractions.append(timeline.fraction)
    late = [total for now, total in predictions if now > 0.1 * clock.now]
    assert all(0.7 * clock.now < total < 1.3 * clock.now for total in late), (clock.now, late)
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1)
    assert timeline.stages["quantizing"].spent == pytest.approx(40 * speed["quantizing"])
    assert timeline.stages["block tuning"].spent == pytest.approx(40 * speed["block tuning"])


def test_time_passes_between_events() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.take(Planned({"reading": 1.0}))
    assert timeline.remaining is None  # without seconds, nothing is known before something is measured
    clock.now = 10
    timeline.take(Progress("reading", 1, 4, "tensors"))
    assert timeline.remaining == pytest.approx(30) and timeline.position == "1/4 tensors"
    clock.now = 20
    assert timeline.remaining == pytest.approx(20) and timeline.fraction == pytest.approx(0.25)


def test_blocks_of_an_interrupted_run_are_done_and_not_measured() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.take(Planned({"quantizing": 40.0}, {f"b.{index}": 10.0 for index in range(4)}))
    for index in range(3):
        clock.now += 1
        timeline.take(BlockReport(f"b.{index}", (), resumed=index < 2, seconds=20.0))
        if index == 2:
            clock.now += 19
            timeline.take(BlockReport("b.3", (), seconds=20.0))
    assert timeline.remaining == 0 and timeline.position == "4/4 blocks"
    assert timeline.stages["quantizing"].spent == 20 and timeline.stages["quantizing"].skipped == 20


def test_a_second_plan_begins_again_for_the_next_run_of_a_command() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for seconds, event in job({"quantizing": 1, "block tuning": 1, "tuning": 1}):
        clock.now += seconds
        timeline.take(event)
    assert timeline.fraction == 1
    timeline.take(Planned({"quantizing": 40}, {"b.0": 20, "b.1": 20}, in_seconds=True))
    assert timeline.fraction == 0
    timeline.take(BlockReport("b.0", (), seconds=1.0))
    assert (timeline.fraction, timeline.position) == (0.5, "1/2 blocks")


def test_there_is_a_bar_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    received: list[Event] = []
    for screen, progress, drawn in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", screen)
        with bar.shown(received.append, progress=progress) as report:
            report(Planned({"reading": 1.0}))
            report(Progress("reading", 1, 2, "tensors"))
        assert ("reading 1/2 tensors" in screen.getvalue()) == drawn
    assert len(received) == 6
    with bar.shown(ignore, progress=False) as report:
        assert report is ignore


def test_the_bar_waits_for_a_stage_that_takes_longer_than_expected() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.take(Planned({"quantizing": 10.0, "saving": 1.0, "scoring": 9.0}, {"b.0": 10.0}, in_seconds=True))
    clock.now = 10
    timeline.take(BlockReport("b.0", (), seconds=10.0))
    timeline.take(Progress("saving", 0, 1, "formats"))
    clock.now = 100
    assert timeline.fraction == 0.5 and timeline.remaining == pytest.approx(9)
    timeline.take(Progress("saving", 1, 1, "formats"))
    assert timeline.forecast is not None
    assert {stage.stage: (stage.expected, stage.measured) for stage in timeline.forecast.stages} == {
        "quantizing": (10, 10), "saving": (1, 90),
    }  # fmt: skip
