"""The command line: one file per command, found by its file name.

A file of this folder that has a function `command` is a command.  It also has

    PANEL   the panel of `llmq --help` that lists it, one of `PANELS`
    ORDER   its position in that panel

stdout carries the result and nothing else; progress and messages go to stderr.  torch and transformers are imported
inside the functions, so that `llmq --help` is fast.
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

import typer

from llmq._version import __version__
from llmq.cli.streams import guarded, print_text, print_traceback
from llmq.cli.terminal import print_error, warning_printer
from llmq.errors import LlmqError

PANELS = ("Quantization", "Inspect", "Run")

app = typer.Typer(
    name="llmq",
    help="Quantize Hugging Face language models to 4 bits, measure the loss in quality, and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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


def _commands() -> list[ModuleType]:
    """The files with a function `command`, in the order of `llmq --help`."""
    files = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    commands = [file for file in files if hasattr(file, "command")]
    return sorted(commands, key=lambda file: (PANELS.index(file.PANEL), file.ORDER, file.__name__))


for _file in _commands():
    _name = _file.__name__.rpartition(".")[2].replace("_", "-")
    app.command(_name, rich_help_panel=_file.PANEL)(_file.command)


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
