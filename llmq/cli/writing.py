"""What `llmq generate` and `llmq chat` share: their options, and the text of one or two models on stdout."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated

from typer import Option

from llmq.cli.paths import begin
from llmq.cli.streams import print_text
from llmq.cli.terminal import messages, print_columns, quiet_transformers
from llmq.engines.sampling import Message, Sampling, Writer
from llmq.errors import ConfigError

CHOICE = "Choice of tokens"
Compare = Annotated[
    str | None,
    Option(
        "--compare", metavar="MODEL", help="A second model, such as the original. It answers the same, after the first."
    ),
]
System = Annotated[str | None, Option("--system", help="The system message of the chat template.")]
MaxTokens = Annotated[
    int, Option("--max-tokens", min=1, help="Maximum number of new tokens; raise it if answers are cut off.")
]
TopP = Annotated[
    float | None,
    Option("--top-p", min=0, max=1, help="Only the most likely tokens of this total share.", rich_help_panel=CHOICE),
]
TopK = Annotated[
    int | None, Option("--top-k", min=1, help="Only this many most likely tokens.", rich_help_panel=CHOICE)
]
MinP = Annotated[
    float | None,
    Option(
        "--min-p", min=0, max=1, rich_help_panel=CHOICE,
        help="Only tokens at least this likely, as a share of the most likely one.",
    ),
]  # fmt: skip
RepetitionPenalty = Annotated[
    float | None,
    Option("--repetition-penalty", min=0.01, help="Above 1: repeat less, such as 1.1.", rich_help_panel=CHOICE),
]
Seed = Annotated[int, Option("--seed", min=0, help="Random seed for temperatures above 0.", rich_help_panel=CHOICE)]


def open_writers(paths: Sequence[str], *, device: str, remote_code: bool) -> dict[str, Writer]:
    """Load models, each under its path."""
    begin(*paths)
    from llmq.engines.writers import open_writer

    quiet_transformers()
    return {path: open_writer(path, device=device, remote_code=remote_code) for path in paths}


def print_written(writer: Writer, prompt: str | Sequence[Message], sampling: Sampling) -> str:
    """Print a text on stdout as it appears, and its speed on stderr; returns the text."""
    pieces = []
    for piece in writer.write(prompt, sampling):
        pieces.append(piece)
        print_text(piece, end="", flush=True)
    print_text()
    messages().print(f"{writer.speed}", style="dim", highlight=False)
    return "".join(pieces)


def print_name(path: str) -> None:
    """Print whose text follows, if there are two models."""
    print_text(f"--- {path}")


def print_compared(texts: Mapping[str, str]) -> None:
    """Print two texts, by the names of their models, side by side in a terminal, and how far they are equal."""
    written = list(texts.values())
    if len(set(written)) == 1:
        messages().print("both texts are equal", style="dim", highlight=False)
        return
    print_columns(texts)
    same = len(os.path.commonprefix(written))
    messages().print(f"the texts are equal up to character {same}", style="dim", highlight=False)


def conversation(system: str | None) -> list[Message]:
    """The start of a chat."""
    return [] if system is None else [{"role": "system", "content": system}]


def require_template(path: str, writer: Writer, why: str, hint: str) -> None:
    """Raise ConfigError if a model has no chat template."""
    if not writer.has_template:
        raise ConfigError(f"{path} has no chat template, which {why} needs", hint=hint)
