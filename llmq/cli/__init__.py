"""The command line: one file a command, each thin.

stdout carries the result and nothing else; progress and messages go to stderr.  torch and transformers are imported
inside the commands, so that `llmq --help` is instant.
"""

import sys
import warnings

import typer

from llmq._version import __version__
from llmq.cli import convert, env, evaluate, generate, inspect, quantize, sensitivity, verify
from llmq.cli.terminal import print_error, warning_printer
from llmq.errors import LlmqError

app = typer.Typer(
    name="llmq",
    help="Quantize Hugging Face language models to 4 bits, measure what is lost, and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"llmq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


QUANTIZATION, INSPECT, RUN = "Quantization", "Inspect", "Run"

app.command("quantize", rich_help_panel=QUANTIZATION)(quantize.command)
app.command("convert", rich_help_panel=QUANTIZATION)(convert.command)
app.command("eval", rich_help_panel=INSPECT)(evaluate.command)
app.command("verify", rich_help_panel=INSPECT)(verify.command)
app.command("inspect", rich_help_panel=INSPECT)(inspect.command)
app.command("sensitivity", rich_help_panel=INSPECT)(sensitivity.command)
app.command("generate", rich_help_panel=RUN)(generate.command)
app.command("env", rich_help_panel=RUN)(env.command)


def main() -> None:
    """Run the command line; leaves with the exit code of the error, if there is one (see llmq/errors.py)."""
    with warnings.catch_warnings():
        warnings.showwarning = warning_printer(warnings.showwarning)
        try:
            app()
        except LlmqError as error:
            print_error(error)
            sys.exit(error.exit_code)
