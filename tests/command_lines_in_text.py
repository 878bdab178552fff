"""Command lines in help texts and documents, read like a shell and parsed like `llmq` does, without running them."""

import re
import shlex
from collections.abc import Iterator, Sequence

from llmq.cli import every_command

CODE_BLOCK = re.compile(r"^(<!-- runs -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELLS = ("console", "bash", "sh")
REDIRECTIONS = ("<", ">", "|", "&&")  # what follows is not for the program


def parse(arguments: Sequence[str]) -> None:
    """Raise what `llmq` raises for unknown commands, unknown or missing options, values and settings.

    `quantize`, `plan` and `sensitivity` check settings before their work, as `quantize --print-config` does.
    """
    command, *rest = arguments
    chosen = every_command()[command]
    with chosen.make_context(f"llmq {command}", list(rest)) as context:
        if command == "quantize" and context.params["config"] is None:
            context.invoke(chosen.callback, **{**context.params, "print_config": True})


def code_blocks(page: str) -> Iterator[tuple[str, str, bool]]:
    """(language, text, whether it is marked to be run) of each fenced block of a page."""
    for mark, language, text in CODE_BLOCK.findall(page):
        yield language, text, bool(mark)


def command_lines(language: str, text: str) -> Iterator[list[str]]:
    """The words of each command of a block; in a `console` block, lines without `$` are output."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if language == "console":
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        words = shlex.split(line, comments=True)
        end = next((place for place, word in enumerate(words) if word in REDIRECTIONS), len(words))
        if words[:end]:
            yield words[:end]


def of_llmq(words: Sequence[str]) -> list[str] | None:
    """The arguments of `llmq`, also behind torchrun and accelerate; None for another program."""
    if words[0] == "llmq":
        return list(words[1:])
    for marker in (["-m", "llmq"], ["--module", "llmq"]):
        for place in range(len(words) - 1):
            if list(words[place : place + 2]) == marker:
                return list(words[place + 2 :])
    return None
