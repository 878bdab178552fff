"""Ctrl-C or SIGTERM in the middle of a run: a message, exit code 130, and the same command resumes the run.

After the end, the same command reports that the run has finished already.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.checkpoint.staging import STAGING
from tests import builders
from tests.command_line import ROOT, Outcome, command, environment, llmq
from tests.runs import files_of

BLOCKS = 12  # enough for the signal to arrive before the end of the run on a fast machine
RECORD = "llmq.json"


@pytest.fixture
def run(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[str | Path, ...]:
    """The command without its output folder."""
    text = builders.write_text(tmp_path / "text.txt")
    return (
        "quantize", checkpoint("llama", num_hidden_layers=BLOCKS), "--calibration", text, "--samples", "32",
        "--validate", "0", "--seqlen", "32", "--group-size", "32", "--method", "fast",
    )  # fmt: skip


def listen() -> None:
    """Handle SIGINT like a process in a terminal; processes that a shell starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted_after_a_block(arguments: tuple[str | Path, ...], sent: signal.Signals) -> Outcome:
    seen = []
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=listen,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            seen.append(line)
            if line.startswith("block 1/"):
                process.send_signal(sent)
        return Outcome(process.wait(timeout=60), process.stdout.read(), "".join(seen))


def record(folder: Path) -> dict[str, Any]:
    """llmq.json without times, memory and output folder."""
    entries: dict[str, Any] = json.loads((folder / RECORD).read_text())
    for key in ("seconds", "peak_memory_bytes", "output", "notes", "command", "forecast"):
        del entries[key]
    for block in entries["blocks"]:
        del block["seconds"], block["resumed"], block["host_bytes"]
    if entries["tuning"] is not None:
        del entries["tuning"]["seconds"]
    return entries


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_run_resumes_to_the_same_bytes(
    sent: signal.Signals, run: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    assert llmq(*run, straight).exit_code == 0

    stopped = interrupted_after_a_block((*run, out), sent)
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    assert "error: interrupted" in stopped.stderr
    assert "repeat the command" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [entry.name for entry in out.iterdir()] == [STAGING]
    finished = len(list((out / STAGING).glob("*.safetensors")))
    assert 1 <= finished < BLOCKS

    again = llmq(*run, out)
    assert again.exit_code == 0
    assert f"continued: {finished} of {BLOCKS} blocks were finished earlier" in again.stderr
    lines = [line for line in again.stderr.splitlines() if line.startswith("block ") and "finished earlier" in line]
    assert len(lines) == finished
    assert files_of(out) == files_of(straight)
    assert record(out) == record(straight)

    written = {entry: entry.stat().st_mtime_ns for entry in out.iterdir()}
    finished = llmq(*run, out)
    assert finished.exit_code == 0
    assert f"finished already: {out}" in finished.stderr.replace("\n", "")
    assert "layers quantized" in finished.stdout
    assert {entry: entry.stat().st_mtime_ns for entry in out.iterdir()} == written


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_the_first_block_leaves_no_files_of(
    run: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.pipeline.quantize_block", interrupt)
    stopped = llmq(*run, tmp_path / "out", "--no-own-text")
    assert stopped.exit_code == 130
    assert "interrupted" in stopped.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_block_keeps_the_text_that_the_model_wrote(
    run: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.pipeline.quantize_block", interrupt)
    assert llmq(*run, tmp_path / "out").exit_code == 130
    monkeypatch.undo()
    continued = llmq(*run, tmp_path / "out")
    assert continued.exit_code == 0 and "text of the interrupted run is used again" in continued.stderr
