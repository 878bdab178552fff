"""Output for people: tables on stdout; progress, messages and errors on stderr."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.errors import LlmqError
from llmq_kernels.errors import KernelWarning

MAX_NOTES = 12


def messages() -> Console:
    """The console for progress and messages."""
    return Console(stderr=True, highlight=False)


def print_error(error: LlmqError) -> None:
    console = messages()
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold]try:[/]   {escape(error.hint)}", soft_wrap=True)


def print_notes(notes: Iterable[str], console: Console | None = None) -> None:
    """Print notes on stderr; a long list is cut, llmq.json has all notes."""
    console, listed = console or messages(), list(notes)
    for note in listed[:MAX_NOTES]:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if len(listed) > MAX_NOTES:
        console.print(f"[yellow]note:[/] and {len(listed) - MAX_NOTES} more, see llmq.json", soft_wrap=True)


def warning_printer(otherwise: Callable[..., None]) -> Callable[..., None]:
    """A `warnings.showwarning` that prints warnings of the kernels as one line, and passes all others on."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if issubclass(category, KernelWarning):
            messages().print(f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
        else:
            otherwise(message, category, *place, **named)

    return show_warning


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], console: Console | None = None
) -> None:
    """Print a table, by default on stdout; the first column is aligned to the left, the others to the right."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # files and pipes have no width to wrap at
    console.print(table)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def quiet_transformers() -> None:
    """Turn off the progress bars and advice of transformers; its errors are still shown."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
