"""Output for people: tables on stdout; progress, messages and errors on stderr."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from llmq.cli.streams import print_text
from llmq.errors import Interrupted, LlmqError
from llmq.report.escaped import printable
from llmq_kernels.errors import KernelWarning

MAX_NOTES = 12


class SafeConsole(Console):
    """A console that escapes control characters in everything that it draws (see `streams.py`)."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """See `Console.render`; segments with `control` are the drawing itself, such as that of a bar."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


_shared: list[Console] = []  # the console of the running bar, if there is one


def messages() -> Console:
    """The console for progress and messages. While a bar is shown, it is the console of the bar.

    rich draws the bar below everything that is printed on its console; another console would print into the bar.
    """
    return _shared[-1] if _shared else SafeConsole(stderr=True, highlight=False)


@contextmanager
def shared_console(console: Console) -> Iterator[None]:
    """While open, all messages are printed on this console."""
    _shared.append(console)
    try:
        yield
    finally:
        _shared.remove(console)


def print_done(text: str, what: object) -> None:
    """Print on stderr that something is done: `text` in green, then the rest."""
    messages().print(f"[bold green]{text}[/]{escape(str(what))}", soft_wrap=True)


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
    table = Table()
    for position, column in enumerate(columns):
        table.add_column(escape(printable(column)), justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))  # before rich measures their widths
    console = console or SafeConsole(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # files and pipes have no width to wrap at
    if title:
        console.print(f"[bold]{escape(printable(title))}[/]", soft_wrap=True)  # a title of the table wraps at its width
    console.print(table)


def print_columns(texts: Mapping[str, str]) -> None:
    """Print texts side by side, each below its name, if stdout is a terminal."""
    console = SafeConsole(highlight=False)
    if console.is_terminal:
        table = Table(expand=True)
        for name in texts:
            table.add_column(escape(printable(name)), ratio=1, overflow="fold")
        table.add_row(*(escape(printable(text)) for text in texts.values()))
        console.print(table)


def print_json(document: Any) -> None:
    print_text(json.dumps(document, indent=2))


def quiet_transformers() -> None:
    """Turn off the progress bars and advice of transformers; its errors are still shown."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM are an error with a hint, and not a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted", hint=hint) from None
