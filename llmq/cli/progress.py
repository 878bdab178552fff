"""Progress on stderr: one bar over the whole job, or plain lines without a terminal; and a log of all events.

    quantizing 3/32 blocks ━━━━━━━━━━╸━━━━━━━━━━━━━ 41 % 0:12:40 ETA 0:18:10
    model.layers.3.mlp.down_proj  error 4.58 % (rtn 6.02 %)  9,120 tokens/s  2.31 GB

`report/timeline.py` knows how far the job is. docs/PROGRESS.md describes the log.
"""

import dataclasses
import json
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmq.cli.manifest import print_manifest
from llmq.cli.streams import print_text
from llmq.cli.terminal import messages, print_notes, shared_console
from llmq.errors import StorageError
from llmq.report.escaped import printable
from llmq.report.events import Event, Planned, Progress, TextRead
from llmq.report.peak import device_memory, peak_memory
from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep
from llmq.report.shown import megabytes
from llmq.report.timeline import Timeline

BAR = 40  # characters at most
SECONDS_PER_LINE = 5.0  # at least, without a terminal; a finished block always has a line


class ProgressDisplay:
    """Shows events; a context manager, which removes the bar at its end.

    silent  show nothing: for all but the first of several processes, and for --quiet
    log     the file of --log-json
    append  add to the log, because a run of the same command has begun it
    """

    def __init__(self, *, silent: bool = False, log: Path | None = None, append: bool = False) -> None:
        self._silent = silent
        self._console = messages()
        self._timeline = Timeline()
        self._detail = ""
        self._last_line = 0.0  # when it was printed
        self._path, self._log = log, None if log is None else _opened(log, append)
        self._open = ExitStack()

    def __enter__(self) -> "ProgressDisplay":
        if not self._silent and self._console.is_terminal:
            self._open.enter_context(shared_console(self._console))
            self._open.enter_context(Live(console=self._console, get_renderable=self._drawing, transient=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        if self._log is not None:
            self._log.close()

    def __call__(self, event: Event) -> None:
        """Show one event, and log it."""
        self._timeline.take(event)
        if self._log is not None:
            self._write(event, self._log)
        if self._silent:
            return
        if isinstance(event, TextRead):
            print_manifest(event.manifest, self._console)
            print_notes(event.notes, self._console)
            return
        self._detail = self._described(event) or self._detail
        if not self._console.is_terminal:
            self._print_line(event)

    def _drawing(self) -> RenderableType:
        """The bar and the line below it, several times per second: the ETA changes also between events."""
        timeline, rest = self._timeline, self._timeline.remaining
        row = Table.grid(padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(max_width=BAR)  # narrower next to a long heading
        row.add_column(no_wrap=True)
        eta = "-:--:--" if rest is None else clock(rest)
        row.add_row(
            Text(self._heading), ProgressBar(total=1.0, completed=timeline.fraction),
            Text(f"{timeline.fraction:4.0%} {clock(timeline.elapsed)} ETA {eta}"),
        )  # fmt: skip
        return Group(row, Text(printable(self._detail), no_wrap=True, overflow="ellipsis"))

    @property
    def _heading(self) -> str:
        """The stage and what is done of it."""
        return f"{self._timeline.current} {self._timeline.position}".strip()

    def _described(self, event: Event) -> str:
        """What the line below the bar shows; nothing for events that leave it as it is."""
        if isinstance(event, LayerReport):
            rate = self._timeline.rate
            speed = "" if rate is None else f"  {rate:,.0f} tokens/s"
            return f"{event.name}  {error_of(event)}{speed}  {megabytes(_memory())}"
        if isinstance(event, TuningStep) and event.validation is not None:
            return f"validation KL {event.validation:.4g}  {megabytes(_memory())}"
        return event.detail if isinstance(event, Progress) else ""

    def _print_line(self, event: Event) -> None:
        """Without a terminal: a line per block, and otherwise one every few seconds."""
        now, timeline = time.monotonic(), self._timeline
        if isinstance(event, BlockReport):
            done, _, total = timeline.position.partition(" ")[0].partition("/")
            print_text(
                f"block {done}/{total or '?'}  {event.path}  {outcome(event)}{self._left()}", flush=True, error=True
            )
        elif isinstance(event, Planned | TuningReport) or now - self._last_line < SECONDS_PER_LINE:
            return
        else:
            shown = f"{timeline.fraction:.0%}  {self._heading}  {self._detail}".rstrip()
            print_text(f"{shown}{self._left()}", flush=True, error=True)
        self._last_line = now

    def _left(self) -> str:
        rest = self._timeline.remaining
        return "" if rest is None or rest < 1 else f"  about {clock(rest)} left"

    def _write(self, event: Event, log: TextIO) -> None:
        """One line of JSON: the event, and how far the job is."""
        timeline, rest = self._timeline, self._timeline.remaining
        record = {
            "time": round(time.time(), 3),
            "event": type(event).__name__,
            "stage": timeline.current,
            "fraction": round(timeline.fraction, 4),
            "elapsed": round(timeline.elapsed, 3),
            "remaining": None if rest is None else round(rest, 3),
            "memory": _memory(),
            **_fields(event),
        }
        try:
            log.write(json.dumps(record) + "\n")
            log.flush()
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written: {error.strerror or error}", hint="check the disk"
            ) from error


def _opened(path: Path, append: bool) -> TextIO:
    try:
        return path.open("a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}", hint="give another --log-json"
        ) from error


def _fields(event: Event) -> dict[str, Any]:
    """The fields of an event, without the layers of a block, which have their own events."""
    fields = dataclasses.asdict(event)
    fields.pop("layers", None)
    return fields if not isinstance(event, Progress) else {**fields, "stage": event.stage}


def _memory() -> int:
    """Peak memory in bytes: that of the GPU if one is used, else that of the process."""
    return device_memory() or peak_memory()


def clock(seconds: float) -> str:
    """`0:01:30`"""
    return str(timedelta(seconds=round(seconds)))


def error_of(layer: LayerReport) -> str:
    """The error of a layer, next to that of rounding to nearest if it is known."""
    nearest = "" if layer.rtn_error is None else f" (rtn {layer.rtn_error:.2%})"
    return f"error {layer.error:.2%}{nearest}"


def outcome(block: BlockReport) -> str:
    """The result of a block in a few words."""
    if block.resumed:
        return "finished earlier"
    if not block.layers:
        return "kept in float"
    worst = max(block.layers, key=lambda layer: layer.error)
    return f"{block.seconds:.1f} s, largest {error_of(worst)} in {worst.name.removeprefix(block.path + '.')}"
