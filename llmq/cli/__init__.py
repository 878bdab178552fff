"""The command line: one file per command, found by its file name.

A file of this folder that has a function `command` is a command.  It also has

    PANEL   the panel of `llmq --help` that lists it, one of `PANELS`
    ORDER   its position in that panel

stdout carries the result and nothing else; progress and messages go to stderr.  A command is imported when it is run,
and torch and transformers inside the functions, so that the first line appears early and `llmq --help` is fast.
"""

import importlib
import pkgutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperGroup

from llmq._version import __version__
from llmq.cli.streams import guarded, print_text, print_traceback
from llmq.cli.terminal import print_error, warning_printer
from llmq.errors import LlmqError

PANELS = ("Quantization", "Inspect", "Run")


class Commands(TyperGroup):
    """The commands of `llmq`. One is imported when it is run; all are imported to be listed or suggested."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of `llmq --help`."""
        imported = {module.name: self._import(module.name) for module in pkgutil.iter_modules(__path__)}
        places = {name: (PANELS.index(file.PANEL), file.ORDER) for name, file in imported.items() if file is not None}
        return sorted(places, key=lambda name: places[name])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command with this name; None if there is none, and then all are known, for a suggestion."""
        if cmd_name not in self.commands and self._import(cmd_name) is None:
            self.list_commands(ctx)
        return self.commands.get(cmd_name)

    def _import(self, name: str) -> ModuleType | None:
        """Import the file of a command and add the command; None for another file."""
        if not any(module.name == name for module in pkgutil.iter_modules(__path__)):
            return None
        file = importlib.import_module(f"{__name__}.{name}")
        if not hasattr(file, "command"):
            return None
        if name not in self.commands:
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
            single.command(name, rich_help_panel=file.PANEL)(file.command)
            self.add_command(typer.main.get_command(single), name)
        return file


app = typer.Typer(
    name="llmq",
    cls=Commands,
    help="Quantize Hugging Face language models to 4 bits, measure the loss in quality, and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def every_command() -> dict[str, Any]:
    """All commands by their names, in the order of `llmq --help`."""
    group: Any = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


def _version(requested: bool) -> None:
    if requested:
        print_text(f"llmq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is like Ctrl-C, but only the first one, so that the run can end in an orderly way.

    Batch systems, containers and torchrun send it before they kill a process.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line. After an error, exit with its exit code (see llmq/errors.py)."""
    sys.excepthook = print_traceback
    with guarded(), warnings.catch_warnings(), stopped_by_sigterm():
        warnings.showwarning = warning_printer(warnings.showwarning)
        try:
            try:
                app()
            finally:
                sys.stdout.flush()
        except LlmqError as error:
            print_error(error)
            sys.exit(error.exit_code)
