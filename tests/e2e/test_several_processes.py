"""Several processes quantize a model together, over gloo on the CPU, as torchrun starts them."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.checkpoint.staging import STAGING
from llmq.methods import METHODS, Tuning
from tests import builders, mixtures, processes, runs
from tests.command_line import Outcome, llmq

RECORD = "llmq.json"
SECONDS = 60  # until the others have ended after one was killed; a few are normal


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    llama, mixtral = builders.llama(), mixtures.mixtral()
    for name, config in {"llama": llama, "mixtral": mixtral}.items():
        builders.save_model(folder / name, builders.causal_model(config, dtype="bfloat16"))
    return {name: folder / name for name in ("llama", "mixtral")}


@pytest.fixture
def options(text: Path) -> tuple[str | Path, ...]:
    return "--calibration", text, "--samples", "40", "--validate", "0", "--seqlen", "48", "--group-size", "16"


def codes(folder: Path, part: str) -> Tensor:
    """All packed codes in a part of the model, one after the other."""
    stored = sorted(runs.tensors_of(folder).items())
    packed = [tensor for name, tensor in stored if name.endswith("weight_packed") and part in name]
    pairs = torch.cat([tensor.flatten().view(torch.uint8) for tensor in packed])
    return torch.cat([pairs & 15, pairs >> 4])


def record(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return document


def layers(folder: Path) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for block in record(folder)["blocks"] for layer in block["layers"]}


def assert_only_the_first_speaks(outcomes: list[Outcome]) -> None:
    assert [outcome.exit_code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].stderr
    assert outcomes[0].stdout and outcomes[0].stderr
    assert [(outcome.stdout, outcome.stderr) for outcome in outcomes[1:]] == [("", "")] * (len(outcomes) - 1)


@pytest.mark.parametrize(
    ("model", "method", "size", "activations"),
    [("llama", "gptq", 2, "int8:static"), ("llama", "fast", 3, "none"), ("mixtral", "fast", 3, "none")],
)
def test_several_processes_give_the_codes_of_one(
    model: str,
    method: str,
    size: int,
    activations: str,
    models: dict[str, Path],
    options: tuple[str | Path, ...],
    tmp_path: Path,
) -> None:
    """And the static scales of inputs, for which smoothing is chosen."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    settings = (*options, "--method", method, "--quantize-head", "--activations", activations)
    assert_only_the_first_speaks(processes.quantize(size, models[model], together, *settings))
    assert llmq("quantize", models[model], alone, *settings, "--device", "cpu").exit_code == 0

    ours, theirs = (codes(folder, "layers.0.") for folder in (together, alone))
    assert len(ours) == len(theirs) and float((ours != theirs).float().mean()) <= 0.001
    static = {name: scale for name, scale in runs.tensors_of(alone).items() if name.endswith("input_scale")}
    assert len(static) == (21 if activations == "int8:static" else 0)
    for name, scale in static.items():
        assert float(runs.tensors_of(together)[name]) == pytest.approx(float(scale), rel=0.01)  # bfloat16
    ours_by_name, theirs_by_name = layers(together), layers(alone)
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, layer in ours_by_name.items():  # one code that differs changes later layers, but not their errors
        assert layer["tokens"] == theirs_by_name[name]["tokens"], "each layer has seen all tokens"
        assert layer["output_error"] == pytest.approx(theirs_by_name[name]["output_error"], rel=0.1)
    assert record(together)["versions"]["processes"] == str(size)


def test_a_killed_process_ends_the_run_and_the_same_command_continues(
    options: tuple[str | Path, ...], tmp_path: Path
) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(builders.llama(num_hidden_layers=8)))
    out, straight = tmp_path / "out", tmp_path / "straight"
    assert_only_the_first_speaks(processes.quantize(2, model, straight, *options, "--method", "gptq"))

    started = processes.start(2, llmq, "quantize", model, out, *options, "--method", "gptq", "--device", "cpu")
    wait_for(lambda: (out / STAGING / "00000.json").exists())
    started[1][0].kill()
    killed = time.monotonic()
    first, second = processes.results(started)
    assert second is None and time.monotonic() - killed < SECONDS
    assert first.exit_code == 130 and first.stdout == ""
    assert "error: another process of this run has ended" in first.stderr
    assert "the same command continues" in first.stderr and "Traceback" not in first.stderr
    assert [entry.name for entry in out.iterdir()] == [STAGING]

    outcomes = processes.quantize(2, model, out, *options, "--method", "gptq")
    assert_only_the_first_speaks(outcomes)
    assert "of 8 blocks were finished earlier" in outcomes[0].stderr
    assert runs.files_of(out) == runs.files_of(straight)


def test_all_processes_continue_when_one_is_out_of_memory(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """In the second block, on another rank than the first; then on the first one."""
    reports = {}
    for name, failures in {
        "straight": [], "out": [(1, "quantize_groups", 6), (0, "restore_block", 1)]
    }.items():  # fmt: skip
        arguments = (models["llama"], tmp_path / name, text, METHODS["gptq"])
        reports[name] = processes.job_out_of_memory(2, failures, *arguments)
    notes = [note for note in reports["out"][0].notes if "out of memory" in note]
    assert ["another process" in notes[0], "in a test" in notes[1], len(notes)] == [True, True, 2]
    straight, out = (runs.tensors_of(tmp_path / name) for name in ("straight", "out"))
    assert straight.keys() == out.keys() and all(torch.equal(straight[key], out[key]) for key in out)


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_of_all_processes_is_printed_once(
    models: dict[str, Path], options: tuple[str | Path, ...], tmp_path: Path
) -> None:
    outcomes = processes.quantize(
        3, models["llama"], tmp_path / "out", *options, "--samples", "2", "--seqlen", "64", "--method", "gptq"
    )
    assert [outcome.exit_code for outcome in outcomes] == [2, 2, 2]
    printed = [outcome.stderr for outcome in outcomes if "error:" in outcome.stderr]
    assert len(printed) == 1 and "2 calibration sequences cannot be divided between 3 processes" in printed[0]
    assert not (tmp_path / "out").exists()


def test_tuning_with_several_processes_is_as_good(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    block_tuning = Tuning(steps=6, scales=1e-3, rounding=1e-2, tokens=192, fisher=True)
    tuning = Tuning(steps=4, scales=1e-3, rounding=1e-3, tokens=96)
    stages = replace(METHODS["best"], block_tuning=block_tuning, tuning=tuning, written=1)
    settings = {"samples": 20, "seqlen": 48, "validate": 0}
    [ours, _] = processes.job(2, models["llama"], tmp_path / "together", text, stages, **settings)
    [theirs] = processes.job(1, models["llama"], tmp_path / "alone", text, stages, **settings)
    assert ours.tuning is not None and theirs.tuning is not None
    assert [block.gains[0].stage for block in ours.blocks] == ["block_tuning"] * 3
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert block.gains[0].before == pytest.approx(other.gains[0].before, rel=0.1)
        assert block.gains[0].after == pytest.approx(other.gains[0].after, rel=0.1)
    for (_, loss), (_, expected) in zip(ours.tuning.history, theirs.tuning.history, strict=True):
        assert loss == pytest.approx(expected, rel=0.1)
