"""Folders that are not a model: all commands that take a model name what they hold, with the same words."""

from pathlib import Path

import pytest

from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError
from tests.command_line import llmq

COMMANDS = (
    ("quantize", "--method", "rtn"),
    ("convert", "OUT", "--to", "gptq"),
    ("eval",),
    ("inspect",),
    ("verify",),
    ("generate", "--prompt", "x"),
    ("chat",),
    ("bench",),
    ("serve", "--print"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_unfinished_runs_and_folders_of_formats_are_named(command: tuple[str, ...], tmp_path: Path) -> None:
    unfinished, several = tmp_path / "unfinished", tmp_path / "several"
    (unfinished / STAGING).mkdir(parents=True)
    for name in ("awq", "gptq", ".llmq-removed"):
        (several / name).mkdir(parents=True)
        (several / name / "config.json").write_text("{}")
    name, *more = (str(tmp_path / "out") if word == "OUT" else word for word in command)
    first = llmq(name, unfinished, *more)
    assert first.exit_code == CheckpointError.exit_code
    assert f"{unfinished} holds an unfinished run of llmq" in first.stderr and "it continues" in first.stderr
    second = llmq(name, several, *more)
    assert second.exit_code == CheckpointError.exit_code
    assert f"give one of them: {several / 'awq'}, {several / 'gptq'}\n" in second.stderr
