"""Progress on stderr: one bar with ETA per stage, or plain lines without a terminal."""

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llmq.cli.manifest import print_manifest
from llmq.cli.streams import print_text
from llmq.cli.terminal import messages, print_notes
from llmq.report.events import Event, Progress, TextRead
from llmq.report.record import BlockReport, LayerReport, TuningReport, TuningStep

LINES = 20  # per stage, without a terminal


class ProgressDisplay:
    """Shows events; a context manager, which removes the bars at its end.

    commits  the number of blocks to quantize; the head counts as one
    silent   show nothing: for all but the first of several processes
    """

    def __init__(self, commits: int = 0, *, silent: bool = False) -> None:
        self._commits = commits
        self._silent = silent
        self._blocks = 0
        self._console = messages()
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, int] = {}  # by stage, the amount done in the last printed line
        self._bars = Bars(
            TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=self._console, disable=silent or not self._console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "ProgressDisplay":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._silent:
            return
        if isinstance(event, TextRead):
            print_manifest(event.manifest, self._bars.console)
            print_notes(event.notes, self._bars.console)
        elif isinstance(event, Progress):
            line = f"{event.stage} {event.done}/{event.total} {event.unit}  {event.detail}".rstrip()
            last = self._last_line.get(event.stage, 0)
            sparse = event.done == event.total or event.done < last or event.done - last >= event.total / LINES
            if sparse:
                self._last_line[event.stage] = event.done
            self._show(event.stage, event.done, event.total, event.unit, event.detail, line if sparse else None)
        elif isinstance(event, BlockReport):
            self._blocks += 1
            line = f"block {self._blocks}/{self._commits}  {event.path}  {outcome(event)}"
            self._show("quantizing", self._blocks, self._commits, "blocks", None, line)
        elif isinstance(event, LayerReport):
            detail = f"{event.name}  error {event.error:.2%}"
            self._show("quantizing", self._blocks, self._commits, "blocks", detail, None)
        elif isinstance(event, TuningStep):
            validation = None if event.validation is None else f"validation KL {event.validation:.4g}"
            note = None if validation is None else f"tuning {event.step}/{event.steps}  {validation}"
            self._show("tuning", event.step, event.steps, "steps", validation, note)
        else:
            assert isinstance(event, TuningReport)  # the result shows it

    def _show(self, stage: str, done: int, total: int, unit: str, detail: str | None, line: str | None) -> None:
        if not self._console.is_terminal:
            if line is not None:
                print_text(line, flush=True, error=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task("", total=total, stage=stage, unit=unit)
        changed = {} if detail is None else {"description": detail}
        self._bars.update(self._tasks[stage], completed=done, total=total, **changed)  # type: ignore[arg-type]


def outcome(block: BlockReport) -> str:
    """The result of a block in a few words."""
    if block.resumed:
        return "finished earlier"
    if not block.layers:
        return "kept in float"
    worst = max(block.layers, key=lambda layer: layer.error)
    return f"{block.seconds:.1f} s, largest error {worst.error:.2%} in {worst.name.removeprefix(block.path + '.')}"
