"""A bar for calls from Python: in a terminal or a notebook, over the whole job."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from llmq.report.events import Event, OnEvent
from llmq.report.record import LayerReport
from llmq.report.timeline import Timeline

FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


@contextmanager
def shown(on_event: OnEvent, *, progress: bool) -> Iterator[OnEvent]:
    """While open, events given to the yielded function reach `on_event`, and are shown as a bar if `progress`.

    There is no bar where nobody would see it: stderr is neither a terminal nor that of a notebook.
    """
    if not progress or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield on_event
        return
    from tqdm.auto import tqdm

    timeline = Timeline()
    with tqdm(total=100, bar_format=FORMAT, leave=False) as bar:
        yield _drawing(timeline, bar, on_event)


def _drawing(timeline: Timeline, bar: Any, on_event: OnEvent) -> OnEvent:
    """Shows each event on a bar of tqdm."""

    def draw(event: Event) -> None:
        timeline.take(event)
        rest = timeline.remaining
        left = "" if rest is None else f"ETA {timedelta(seconds=round(rest))}"
        layer = f"{event.name} error {event.error:.2%}" if isinstance(event, LayerReport) else ""
        bar.set_description_str(f"{timeline.current} {timeline.position}".strip(), refresh=False)
        bar.set_postfix_str("  ".join(filter(None, (left, layer))), refresh=False)
        bar.n = round(100 * timeline.fraction, 1)
        bar.refresh()
        on_event(event)

    return draw
