"""Reproducibility: a second run, and an interrupted and continued run, write the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.errors import ConfigError
from llmq.methods import METHODS, Method, Tuning
from llmq.report.events import Event
from llmq.report.record import LayerReport
from tests.runs import files_of, job, quantize, stop, stop_in_block

Checkpoints = Callable[..., Path]

# The last one rounds biases after folding: a block that is read back must equal the block in memory.
MODELS = [("llama", "float32"), ("gemma3", "bfloat16"), ("stablelm", "bfloat16")]


def interrupt(model: Path, out: Path, text: Path, *, blocks: int, **settings: Any) -> None:
    """Start a run and stop it after `blocks` blocks, one layer into the next block."""
    stop_in_block(job(model, out, text, **settings), blocks)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_an_interrupted_run_ends_in_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, text: Path, name: str, dtype: str, method: str
) -> None:
    model, out = checkpoint(name, dtype=dtype), tmp_path / "out"
    whole = quantize(model, tmp_path / "whole", text, method=method)
    interrupt(model, out, text, blocks=2, method=method)
    assert not (out / "config.json").exists() and not list(out.glob("*.safetensors"))
    continued = quantize(model, out, text, method=method)
    assert [block.resumed for block in continued.blocks] == [True, True, False]
    assert any(note.startswith("continued: 2 of 3 blocks") for note in continued.notes)
    assert continued.layers == whole.layers
    assert files_of(out) == files_of(tmp_path / "whole")


STAGES = {
    "both streams": METHODS["fast"],
    "refined": Method(rounding="gptq", refinements=("descent", "refit"), validation=0.25),
    "transformed": Method(transforms=("awq",), rounding="gptq", alphas=(1.0,), refinements=("refit",), validation=0.25),
    "rotated": METHODS["fast"].rotated(),
    "weighted, tuned": Method(
        rounding="gptq", token_weights=True, alphas=(1.0,), block_tuning=Tuning(5, 0.0, 0.02, 48), validation=0.25
    ),
    "transformed, tuned": Method(
        transforms=("awq",), rounding="clip", block_tuning=Tuning(5, 0.01, 0.02, 48), validation=0.25
    ),
}


@pytest.mark.parametrize("stages", STAGES)
def test_a_run_with_validation_ends_in_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, text: Path, stages: str
) -> None:
    """Both streams are run through the finished blocks, and the recorded gains are read back."""
    model, out = checkpoint("llama", dtype="bfloat16"), tmp_path / "out"
    whole = quantize(model, tmp_path / "whole", text, stages=STAGES[stages])
    interrupt(model, out, text, blocks=2, stages=STAGES[stages])
    continued = quantize(model, out, text, stages=STAGES[stages])
    assert [block.resumed for block in continued.blocks] == [True, True, False]
    assert continued.layers == whole.layers and continued.stages == whole.stages and whole.stages
    assert [block.gains for block in continued.blocks] == [block.gains for block in whole.blocks]
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_run_is_not_resumed_with_other_stages(checkpoint: Checkpoints, tmp_path: Path, text: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    interrupt(model, out, text, blocks=1, stages=METHODS["fast"])
    with pytest.raises(ConfigError, match="other settings"):
        quantize(model, out, text, stages=STAGES["refined"])


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_two_runs_end_in_the_same_bytes(checkpoint: Checkpoints, tmp_path: Path, text: Path, method: str) -> None:
    model = checkpoint("llama")
    reports = [quantize(model, tmp_path / out, text, method=method) for out in ("first", "second")]
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert reports[0].layers == reports[1].layers


def test_overwrite_starts_a_run_with_other_settings(checkpoint: Checkpoints, tmp_path: Path, text: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    interrupt(model, out, text, blocks=1, method="gptq")
    with pytest.raises(ConfigError, match="finished blocks of a run with other settings"):
        quantize(model, out, text, method="gptq", seed=1)
    report = quantize(model, out, text, method="gptq", seed=1, overwrite=True)
    assert not any(block.resumed for block in report.blocks)
    assert any("discarded" in note for note in report.notes)
    assert json.loads((out / "llmq.json").read_text())["settings"]["seed"] == 1


def test_a_run_that_ends_before_its_first_block_leaves_no_files(
    checkpoint: Checkpoints, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "out"

    def first_layer(event: Event) -> bool:
        return isinstance(event, LayerReport) and out.exists()

    stop(job(checkpoint("llama"), out, text, method="gptq").run, first_layer)
    assert not out.exists()
