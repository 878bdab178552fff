"""What a person sees: tables on stdout; progress, messages and errors on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from llmq.errors import LlmqError
from llmq.report.record import BlockReport, ConvertStep, LayerReport, MeasuringStep, TuningStep
from llmq_kernels.errors import KernelWarning

MAX_NOTES = 12
Step = LayerReport | BlockReport | MeasuringStep | TuningStep | ConvertStep  # of the work, as it is done


def messages() -> Console:
    """Where progress and messages go."""
    return Console(stderr=True, highlight=False)


def print_error(error: LlmqError) -> None:
    console = messages()
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold]try:[/]   {escape(error.hint)}", soft_wrap=True)


def print_notes(notes: Iterable[str]) -> None:
    """What a user should know, on stderr; a long list is cut, the record beside the weights has all of it."""
    console, listed = messages(), list(notes)
    for note in listed[:MAX_NOTES]:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if len(listed) > MAX_NOTES:
        console.print(f"[yellow]note:[/] and {len(listed) - MAX_NOTES} more, see llmq.json", soft_wrap=True)


def warning_printer(otherwise: Callable[..., None]) -> Callable[..., None]:
    """A `warnings.showwarning` that shows the kernels' own warnings as one line, and leaves all others as they are."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if issubclass(category, KernelWarning):
            messages().print(f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
        else:
            otherwise(message, category, *place, **named)

    return show_warning


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], console: Console | None = None
) -> None:
    """A table, on stdout if no other console is given; the first column is text, the others are figures."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no edge to wrap at
    console.print(table)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def bars(console: Console) -> Progress:
    """Bars with ETA; a task has the fields `doing` and `unit`, and as its description what is at hand."""
    return Progress(
        TextColumn("{task.fields[doing]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console,
    )  # fmt: skip


def show(work: Iterator[Step], total: int) -> None:
    """Do the work and show how far it is: bars with ETA, or a plain line a block where there is no terminal."""
    console = messages()
    if not console.is_terminal:
        _print_lines(work, total)
        return
    with bars(console) as progress:
        blocks = progress.add_task("reading the text", total=total, doing="quantizing", unit="blocks")
        steps: TaskID | None = None
        for done in work:
            if isinstance(done, BlockReport):
                progress.advance(blocks)
            elif isinstance(done, LayerReport):
                progress.update(blocks, description=f"{done.name}  error {done.error:.2%}")
            elif isinstance(done, MeasuringStep):
                progress.update(blocks, description=_measured(done))
            elif isinstance(done, ConvertStep):
                progress.update(blocks, description=f"{done.doing} {done.done}/{done.total} weights")
            else:
                if steps is None:
                    steps = progress.add_task("", total=done.steps, doing="tuning", unit="steps", completed=done.step)
                told = {} if done.held_out is None else {"description": _judged(done)}
                progress.update(steps, completed=done.step, **told)  # type: ignore[arg-type]


def show_measuring(work: Iterator[MeasuringStep], total: int) -> None:
    """The same for a measurement of every layer."""
    console = messages()
    if console.is_terminal:
        for _ in track(work, "measuring", total=total, console=console):
            pass
    else:
        for step in work:
            print(_measured(step), file=sys.stderr, flush=True)


def _print_lines(work: Iterator[Step], total: int) -> None:
    blocks = 0
    for done in work:
        if isinstance(done, BlockReport):
            blocks += 1
            print(f"block {blocks}/{total}  {done.path}  {_outcome(done)}", file=sys.stderr, flush=True)
        elif isinstance(done, MeasuringStep):
            print(_measured(done), file=sys.stderr, flush=True)
        elif isinstance(done, ConvertStep) and done.done == done.total:
            print(f"{done.doing} {done.total} weights", file=sys.stderr, flush=True)
        elif isinstance(done, TuningStep) and done.held_out is not None:
            print(f"tuning {done.step}/{done.steps}  {_judged(done)}", file=sys.stderr, flush=True)


def _measured(step: MeasuringStep) -> str:
    return f"measured {step.block}/{step.blocks} blocks"


def _judged(step: TuningStep) -> str:
    return f"held-out KL {step.held_out:.4g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice off the terminal; its errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _outcome(block: BlockReport) -> str:
    if block.resumed:
        return "finished earlier"
    if not block.layers:
        return "left as it is"
    worst = max(block.layers, key=lambda layer: layer.error)
    return f"{block.seconds:.1f} s, worst error {worst.error:.2%} in {worst.name.removeprefix(block.path + '.')}"
