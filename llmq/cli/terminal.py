"""What a person sees: tables on stdout; progress, messages and errors on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llmq.errors import LlmqError
from llmq.report.record import BlockReport, LayerReport
from llmq_kernels.errors import KernelWarning

MAX_NOTES = 12


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


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no edge to wrap at
    console.print(table)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def show(work: Iterator[LayerReport | BlockReport], total: int) -> None:
    """Do the work and show how far it is: a bar with ETA, or a plain line a block where there is no terminal."""
    console = messages()
    if not console.is_terminal:
        blocks = (done for done in work if isinstance(done, BlockReport))
        for number, block in enumerate(blocks, 1):
            print(f"block {number}/{total}  {block.path}  {_outcome(block)}", file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("quantizing"), BarColumn(), MofNCompleteColumn(), TextColumn("blocks"), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading the text", total=total)
        for done in work:
            if isinstance(done, BlockReport):
                progress.advance(task)
            else:
                progress.update(task, description=f"{done.name}  error {done.error:.2%}")


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
