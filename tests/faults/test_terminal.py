r"""Text from strangers on the terminal: control characters are shown as escapes, whatever prints them.

`BELL` writes to the clipboard of many terminals, `ERASED` moves the cursor over an earlier line and erases it.
"""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from llmq.cli import streams, terminal
from llmq.errors import CheckpointError
from tests.command_line import ROOT, command, environment, llmq

BELL, ERASED = "\x1b]52;c;ZXZpbA==\x07", "\x1b[1A\x1b[2K"
HOSTILE = f"{BELL}{ERASED}\x9b31m\r\u202eabc\ud800"
SHOWN = "\\x1b]52;c;ZXZpbA==\\x07\\x1b[1A\\x1b[2K\\x9b31m\\r\\u202eabc\\ud800"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal_of(width: int = 200) -> Iterator[Terminal]:
    """A terminal at stdout and stderr."""
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        with mock.patch.dict(os.environ, COLUMNS=str(width), TERM="xterm-256color"):
            yield screen


def test_control_characters_become_escapes() -> None:
    assert streams.printable(HOSTILE) == SHOWN
    assert streams.printable("tab\tline\nemoji 👩\u200d🔬 e\u0301") == "tab\tline\nemoji 👩\u200d🔬 e\u0301"


def test_everything_that_llmq_prints_is_escaped() -> None:
    with terminal_of() as screen:
        terminal.print_table(HOSTILE, ("weight", HOSTILE), [("a", HOSTILE)])
        terminal.print_error(CheckpointError(HOSTILE, hint=HOSTILE))
        terminal.print_notes([HOSTILE])
        terminal.print_done("done:", HOSTILE)
        streams.print_text(HOSTILE)
        streams.print_traceback(ValueError, ValueError(HOSTILE), None)
    shown = screen.getvalue()
    assert shown.count("\\x1b]52;c;ZXZpbA==") == 9
    assert shown.count("\\x1b[1A\\x1b[2K\\x9b31m") == 9
    assert shown.count("\\u202eabc\\ud800") == 9
    assert not {"\x07", "\x9b", "\u202e", "\ud800"} & set(shown)
    assert ERASED not in shown and "\x1b]" not in shown


def test_progress_bars_still_draw_and_escape_their_text() -> None:
    with terminal_of() as screen, streams.guarded(), Progress(console=terminal.messages()) as bars:
        bars.update(bars.add_task("", total=2), completed=1, description=f"layer {HOSTILE}")
    shown = screen.getvalue()
    assert "\x1b[2K" in shown and re.search(r"\x1b\[[0-9;]+m", shown)  # erased lines and colors of the bar
    assert "\\x1b]52;c;ZXZpbA==" in shown and "\x1b]" not in shown


def test_streams_escape_what_other_packages_write() -> None:
    with terminal_of() as screen, streams.guarded():
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "unknown type %s", (BELL,), None))
        sys.stdout.write(f"\x1b[31mred\x1b[0m\r{BELL}\x9d")
    shown = screen.getvalue()
    assert shown.count("\\x1b]52;c;ZXZpbA==\\x07") == 2
    assert "\x1b]" not in shown and "\x9d" not in shown
    assert "\x1b[31mred\x1b[0m\r" in shown  # colors and bars


def test_names_in_a_checkpoint_do_not_reach_the_terminal(model: Path) -> None:
    save_file({f"{BELL}{ERASED}.weight": torch.zeros(4, 4)}, model / "model.safetensors", metadata={"format": "pt"})
    shown = llmq("inspect", model)
    assert shown.exit_code in (0, 3)  # listed, or refused because the model has no such tensor
    assert "\x1b" not in shown.stdout + shown.stderr + llmq("inspect", model, "--json").stdout
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": HOSTILE}}))
    refused = llmq("inspect", model)
    assert refused.exit_code == 3 and "\x1b" not in refused.stderr


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@FULL
@pytest.mark.parametrize("arguments", [("--version",), ("quantize", "model", "--print-config")], ids=" ".join)
def test_full_disk_behind_stdout_is_an_error(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            command(*arguments),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
            check=False,
        )
    assert done.returncode == 7
    assert "error: the output cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(command('quantize', 'model', '--print-config'))} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1)  # 0 if the pipe took everything before its reader left
    assert done.stderr == ""
