"""The command line on bad input: the run that must fail, and the checks of its error message."""

from pathlib import Path

from tests.command_line import Outcome, llmq

CONFIG, CHECKPOINT, UNSUPPORTED, CALIBRATION, BACKEND, STORAGE = range(2, 8)  # exit codes, see llmq/errors.py
WEIGHTS = "model.safetensors"


def quantize(model: str | Path, out: Path, *options: str | Path, calibration: str | Path | None = None) -> Outcome:
    """Quantize with short sequences and small groups; without calibration text, with rounding to nearest."""
    source = ("--method", "rtn") if calibration is None else ("--calibration", calibration)
    return llmq("quantize", model, out, *source, "--samples", "4", "--seqlen", "32", "--group-size", "32", *options)


def refused(outcome: Outcome, exit_code: int, problem: str, hint: str = "") -> None:
    """Check the exit code, and that only stderr has a message with the problem and the hint."""
    assert outcome.exit_code == exit_code, outcome.stderr
    assert outcome.stdout == ""
    message, _, way_out = outcome.stderr.partition("\ntry:")
    assert "error: " in message
    assert problem in message
    assert hint in way_out
    assert "Traceback" not in outcome.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
