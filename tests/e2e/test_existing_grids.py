"""Whole runs on models whose weights already lie on a grid: these weights are stored without a second rounding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from llmq.cli import app
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import Method, Tuning
from llmq.setting_fields import merged
from tests.runs import job, quantize, relative, stop_in_block, weights

Checkpoints = Callable[..., Path]
LOSSLESS = "lossless: already on a 4-bit grid of 32"
ALL_STAGES = Method(
    rounding="gptq",
    alphas=(1.0,),
    refinements=("descent", "refit"),
    block_tuning=Tuning(steps=2, scales=0.0, rounding=1e-2, tokens=96),
    tuning=Tuning(steps=2, scales=1e-3, rounding=1e-2, tokens=96),
    validation=0.25,
)


def symmetric(weight: Tensor) -> Tensor:
    """Round to a symmetric grid of 4 bits and 32 columns with bfloat16 scales."""
    groups = weight.float().reshape(-1, 32)
    s = (groups.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float()
    return (s * (groups / s).round().clamp(-8, 7)).reshape(weight.shape)


def with_offsets(weight: Tensor) -> Tensor:
    """Round to Q4_1."""
    groups = weight.float().reshape(-1, 32)
    m = groups.amin(1, keepdim=True).half().float()
    d = ((groups.amax(1, keepdim=True) - m) / 15).half().float()
    return (d * ((groups - m) / d).round().clamp(0, 15) + m).reshape(weight.shape)


def dequantized(model: Path, out: Path, grid: Callable[[Tensor], Tensor], only: str = "") -> Path:
    """A copy of a model in which the linear layers whose name contains `only` lie on a grid."""
    shutil.copytree(model, out)
    file = out / "model.safetensors"
    tensors = load_file(file)
    chosen = [name for name in tensors if "_proj." in name and only in name]
    tensors |= {name: grid(tensors[name]).to(torch.bfloat16).contiguous() for name in chosen}
    save_file(tensors, file, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return checkpoint("llama", dtype="bfloat16", num_hidden_layers=2, **sizes)


@pytest.fixture(scope="module")
def on_grid(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dequantized(model, tmp_path_factory.mktemp("grid") / "model", symmetric)


def linears(out: Path, model: Path) -> dict[str, Tensor]:
    """The quantized linear layers of a run, as floats, by their names in the model."""
    if not (file := out / f"{out.name}.gguf").is_file():
        return weights(out)
    from llmq.gguf.reader import Weights

    stored = Weights(file, model)
    return {name: stored.tensor(name) for name in load_file(model / "model.safetensors") if "_proj." in name}


def assert_lossless(out: Path, model: Path, only: str = "") -> None:
    """The dequantized layers, rounded to bfloat16, are those of the model."""
    made, original = linears(out, model), load_file(model / "model.safetensors")
    for name in (name for name in original if "_proj." in name and only in name):
        assert torch.equal(made[name].to(torch.bfloat16), original[name]), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_on_a_grid_is_stored_without_loss(on_grid: Path, text: Path, tmp_path: Path, method: str) -> None:
    report = quantize(on_grid, tmp_path / "out", text, method=method, group_size=32)
    assert_lossless(tmp_path / "out", on_grid)
    assert {layer.existing_grid for layer in report.layers} == {"4-bit grid of 32"}
    assert all(LOSSLESS in layer.notes and layer.weight_error < 0.003 for layer in report.layers)
    assert f"{LOSSLESS} (14 of 14 layers)" in report.notes
    assert LOSSLESS in (tmp_path / "out" / "llmq.json").read_text()


def test_no_stage_moves_the_layers_on_a_grid(model: Path, text: Path, tmp_path: Path) -> None:
    half = dequantized(model, tmp_path / "half", symmetric, only="mlp")
    report = job(half, tmp_path / "out", text, stages=ALL_STAGES, group_size=32).run()
    assert_lossless(tmp_path / "out", half, only="mlp")
    assert {layer.name.split(".")[3] for layer in report.layers if layer.existing_grid} == {"mlp"}
    assert f"{LOSSLESS} (6 of 14 layers)" in report.notes
    assert report.tuning is not None


def test_nothing_is_tuned_if_all_layers_are_on_a_grid(on_grid: Path, text: Path, tmp_path: Path) -> None:
    report = job(on_grid, tmp_path / "out", text, stages=ALL_STAGES, group_size=32).run()
    assert_lossless(tmp_path / "out", on_grid)
    assert report.tuning is None


def test_an_interrupted_run_keeps_the_grid(on_grid: Path, text: Path, tmp_path: Path) -> None:
    stop_in_block(job(on_grid, tmp_path / "out", text, method="rtn", group_size=32), 1)
    quantize(on_grid, tmp_path / "out", text, method="rtn", group_size=32)
    assert_lossless(tmp_path / "out", on_grid)


def test_the_flag_turns_it_off(on_grid: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(on_grid, tmp_path / "out", text, method="rtn", group_size=32, keep_grid=False)
    assert not any(layer.existing_grid for layer in report.layers)
    assert not any("grid" in note for note in report.notes)


def test_q4_1_is_stored_without_loss_in_q4_1(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from llmq.gguf.reader import Container

    offsets = dequantized(model, tmp_path / "model", with_offsets)
    settings = merged(QuantConfig(), {"method": "gptq", "format": "gguf:q4_1", "calibration": [text], "seqlen": 48})
    report = Job(str(offsets), tmp_path / "out", merged(settings, {"samples": 4}), device="cpu").run()
    assert {layer.existing_grid for layer in report.layers} == {"4-bit grid of 32 with offsets"}
    kinds = {name: tensor.kind for name, tensor in Container(tmp_path / "out" / "out.gguf").tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_1"
    assert_lossless(tmp_path / "out", offsets)


@pytest.mark.parametrize("recipe", ["gguf:q4_0", "gguf:q4_1"])
def test_float_models_are_quantized_to_these_types_too(model: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("gguf")
    values: dict[str, Any] = {"format": recipe, "calibration": [text], "seqlen": 48, "samples": 4}
    report = Job(str(model), tmp_path / "out", merged(QuantConfig(), values), stages=ALL_STAGES, device="cpu").run()
    assert not any(layer.existing_grid for layer in report.layers)
    assert all(0.01 < layer.weight_error < 0.3 for layer in report.layers)
    made, original = linears(tmp_path / "out", model), load_file(model / "model.safetensors")
    for name in (name for name in original if "_proj." in name):
        assert relative(made[name], original[name].float()) < 0.3


def plan_of(model: Path, **settings: Any) -> Any:
    return Job(str(model), settings=merged(QuantConfig(), {"method": "rtn", **settings}), device="cpu").plan


def test_the_plan_names_settings_that_hold_the_grid(on_grid: Path) -> None:
    pytest.importorskip("gguf")
    plan = plan_of(on_grid, group_size=64, skip=["down_proj"])
    assert [sighting.exact for sighting in plan.existing_grids.values()] == [None] * 12
    [note] = plan.grid_notes
    assert note == (
        "the weights of 12 of 14 layers lie on a 4-bit grid of 32, which int4 g64 symmetric cannot hold: "
        "--group-size 32 or --format gguf:q4_0 keeps them exactly"
    )


def test_the_plan_names_the_format_for_real_offsets(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    offsets = dequantized(model, tmp_path / "model", with_offsets)
    [note] = plan_of(offsets, group_size=32).grid_notes
    assert "4-bit grid of 32 with offsets, which int4 g32 symmetric cannot hold: --format gguf:q4_1 keeps" in note


def test_a_plan_of_a_float_model_has_no_notes(model: Path) -> None:
    plan = plan_of(model, group_size=32)
    assert plan.existing_grids == {} and plan.grid_notes == []


def test_the_dry_run_shows_the_grid(on_grid: Path) -> None:
    command = ["quantize", str(on_grid), "--method", "rtn", "--group-size", "32", "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and LOSSLESS in shown.output
    layers = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["layers"]
    assert {layer["existing_grid"] for layer in layers} == {LOSSLESS}
