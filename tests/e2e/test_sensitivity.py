"""`llmq sensitivity`, and `--target-bits` from the command to the finished folder."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import llmq
from tests import command_line
from tests.runs import job, quantize, stop_in_block

Checkpoints = Callable[..., Path]
TEXT = ("--samples", "4", "--seqlen", "48", "--windows", "1")
TARGET: dict[str, Any] = {"group_size": 128, "target_bits": 5.5}


@pytest.fixture
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", dtype="bfloat16", hidden_size=128, intermediate_size=256, num_hidden_layers=2)


def stored_bits(out: Path, model: Path) -> float:
    """Bits per weight of the linear layers in the blocks, from the stored tensors alone."""
    bits, weights = 0, 0
    for folder, count in ((out, False), (model, True)):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    tensor = tensors.get_tensor(name)
                    if "_proj" not in name:
                        continue
                    if count:
                        weights += tensor.numel()
                    else:
                        bits += 8 * tensor.nbytes
    return bits / weights


def test_a_run_meets_its_target_bits(model: Path, tmp_path: Path, text: Path) -> None:
    report = quantize(model, tmp_path / "out", text, **TARGET)
    assert 5.0 < stored_bits(tmp_path / "out", model) <= 5.5
    assert report.bits_per_weight == stored_bits(tmp_path / "out", model)
    [note] = (note for note in report.notes if " of 5.5 bits: " in note)
    assert "int8 g128 symmetric" in note and "predicted KL" in note
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    assert loaded is not None


def test_recorded_settings_give_the_same_model_without_measuring(
    model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "out", text, **TARGET)
    settings = json.loads((tmp_path / "out" / "llmq.json").read_text())["settings"]
    assert settings["overrides"] and "target_bits" not in settings
    from llmq.config import QuantConfig
    from llmq.mixed_precision import sensitivity

    monkeypatch.setattr(sensitivity, "measure", None)
    llmq.quantize(str(model), tmp_path / "again", config=QuantConfig.model_validate(settings), device="cpu")
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_interrupted_run_continues_with_the_same_plan(model: Path, tmp_path: Path, text: Path) -> None:
    whole = quantize(model, tmp_path / "whole", text, **TARGET)
    stop_in_block(job(model, tmp_path / "out", text, **TARGET), 1)
    continued = quantize(model, tmp_path / "out", text, **TARGET)
    assert [block.resumed for block in continued.blocks] == [True, False]
    assert continued.layers == whole.layers


def test_fused_layers_share_their_grid(model: Path, tmp_path: Path, text: Path) -> None:
    report = quantize(model, tmp_path / "out", text, method="rtn", group_size=128, target_bits=4.9)
    schemes = {layer.name.rpartition("layers.")[2]: layer.scheme for layer in report.layers}
    assert len(set(schemes.values())) > 1
    for block in "01":
        assert len({schemes[f"{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({schemes[f"{block}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1


def test_the_table_as_json(model: Path, text: Path) -> None:
    outcome = command_line.llmq(
        "sensitivity", model, "--calibration", text, *TEXT, "--grid", "4:32", "--grid", "8", "--json"
    )
    assert outcome.exit_code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert len(result["units"]) == 8 and result["tokens"] == 48
    first = result["units"][0]
    assert first["layers"] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    grids = first["grids"]
    assert grids["int4 g32 symmetric"]["bits_per_weight"] == 4.5 + 3 * 128 / first["weights"]  # and three stored shapes
    assert grids["int4 g32 symmetric"]["kl"] > grids["int8 g128 symmetric"]["kl"] > 0


def test_sensitivity_prints_a_table_and_a_plan_and_writes_a_plot(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    outcome = command_line.llmq(
        "sensitivity", model, "--calibration", text, *TEXT, "--target-bits", "4.5", "--plot", picture
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert "model.layers.1: mlp: down_proj" in outcome.stdout and " of 4.5 bits: " in outcome.stdout
    assert "float model checked" in outcome.stderr  # the first line; later ones are seconds apart
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    outcome = command_line.llmq("sensitivity", model, "--plot", "map.png")
    assert outcome.exit_code == 2
    assert (
        "needs matplotlib, which is not installed" in outcome.stderr
        and "pip install 'llmq-quantize[plots]'" in outcome.stderr
    )


def test_an_unknown_plot_format_is_refused_before_reading_text(model: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = command_line.llmq("sensitivity", model, "--calibration", "nowhere.txt", "--plot", "map.xyz")
    assert outcome.exit_code == 2 and "end the name with .png" in outcome.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--target-bits", "3"), "the smallest grids take 4.13"),
        (("--target-bits", "4.5", "--format", "awq"), "awq files have one grid"),
        (("--grid", "four"), "invalid grid 'four'"),
    ],
)
def test_invalid_requests_are_refused_before_reading_text(model: Path, settings: tuple[str, ...], words: str) -> None:
    outcome = command_line.llmq("sensitivity", model, "--calibration", "nowhere.txt", *settings)
    assert outcome.exit_code == 2 and words in outcome.stderr


@pytest.mark.parametrize("activations", ["int8", "int8:static"])
def test_inputs_are_measured_alone(checkpoint: Checkpoints, text: Path, activations: str) -> None:
    request = ("sensitivity", checkpoint("llama"), "--calibration", text, *TEXT, "--activations", activations)
    done = command_line.llmq(*request, "--skip", "o_proj")
    assert done.exit_code == 0, done.stderr
    assert "with only the inputs of these layers quantized" in " ".join(done.stdout.split())
    result = json.loads(command_line.llmq(*request, "--json").stdout)
    kind = "dynamic per token" if activations == "int8" else "static per tensor"
    values = {unit["layers"][0]: unit["grids"][f"inputs int8 {kind}"]["kl"] for unit in result["units"]}
    assert len(values) == 3 * 4 and all(0 < value < 0.1 for value in values.values())
    assert "o_proj" not in done.stdout
    refused = command_line.llmq(*request, "--grid", "4:32")
    assert refused.exit_code == 2 and "--grid is for weights" in refused.stderr
