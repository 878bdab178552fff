"""`llmq COMMAND --help` has the same parts for every command, and its examples are valid command lines."""

import re

import pytest

from llmq.cli import every_command
from tests.command_lines_in_text import command_lines, parse

COMMANDS = every_command()
PARTS = ("Examples:", "Exit codes:", "See also:")


def part(command: str, name: str) -> list[str]:
    """The lines of one part of a help text."""
    text = COMMANDS[command].help or ""
    return [line.strip() for line in text.partition(name)[2].split("\n\n")[0].splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parts_are_in_order(command: str) -> None:
    text = COMMANDS[command].help or ""
    places = [text.find(f"{name}\n") for name in PARTS]
    assert -1 not in places and places == sorted(places), f"{command} needs {PARTS}"


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_valid(command: str) -> None:
    for words in command_lines("sh", "\n".join(part(command, "Examples:"))):
        assert words[:2] == ["llmq", command]
        parse(words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_begin_with_success(command: str) -> None:
    lines = part(command, "Exit codes:")
    assert re.match(r"0  (success|the server ended)", lines[0])
    codes = {int(code) for line in lines for code in re.findall(r"(?:^|  )(\d+)  ", line)}
    assert codes <= {0, 1, 2, 3, 4, 5, 6, 7, 8, 130}


@pytest.mark.parametrize("command", COMMANDS)
def test_see_also_names_other_commands(command: str) -> None:
    for line in part(command, "See also:"):
        program, other, *_ = line.split()
        assert program == "llmq" and other in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    unexplained = [option.name for option in COMMANDS[command].params if not getattr(option, "help", None)]
    assert unexplained == []
