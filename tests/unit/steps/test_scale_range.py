"""Weights whose scales the format cannot hold: noticed, reported, and stored in another way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.numerics.scheme import WeightScheme
from llmq.steps.scale_range import out_of_range
from tests.runs import quantize, tensors_of, weights

Checkpoints = Callable[..., Path]
LAYER = "model.layers.1.mlp.up_proj"
HALF, BRAIN = torch.float16, torch.bfloat16


def matrix(size: float) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "held"), [(1.0, True), (1e-3, True), (1e-5, False), (1e6, False)])
def test_float16_scales(size: float, held: bool, symmetric: bool) -> None:
    scheme = WeightScheme(4, 32, symmetric)
    assert (out_of_range(matrix(size), scheme, HALF) is None) is held
    assert out_of_range(matrix(size), scheme, BRAIN) is None


def test_few_tiny_weights_and_zeros_do_not_count() -> None:
    weight = matrix(1.0)
    weight[0] *= 1e-7
    weight[1] = 0
    assert out_of_range(weight, WeightScheme(4, 32), HALF) is None
    assert out_of_range(torch.zeros(4, 64), WeightScheme(4, "tensor"), HALF) is None


def test_the_reason_has_the_figures() -> None:
    reason = out_of_range(matrix(1e-5), WeightScheme(4, "channel"), HALF)
    assert reason is not None and "float16 scales are 6.2e-05 to 6.6e+04" in reason and "% of the weight's" in reason


@pytest.mark.parametrize(("size", "held"), [(1.0, True), (1e-5, False), (1e9, False)])
def test_scales_of_a_two_level_grid(size: float, held: bool) -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * size
    assert (out_of_range(weight, WeightScheme(4, 32, False, "q4_k"), HALF) is None) is held


@pytest.mark.parametrize(("format_", "packed"), [("gptq", False), ("compressed-tensors", True)])
def test_a_layer_of_tiny_weights_is_not_lost(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, format_: str, packed: bool
) -> None:
    folder = shutil.copytree(checkpoint("llama", dtype="float16"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"] *= 2e-4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    original = tensors[f"{LAYER}.weight"].float()
    report = quantize(folder, tmp_path / "out", text, method="gptq", format=format_)
    stored = tensors_of(tmp_path / "out")
    if packed:
        assert stored[f"{LAYER}.weight_scale"].dtype == torch.float32
        error = (weights(tmp_path / "out")[f"{LAYER}.weight"] - original).norm() / original.norm()
        assert error < 0.2
    else:
        assert torch.equal(stored[f"{LAYER}.weight"].float(), original)
        assert "float16 scales are" in report.left[LAYER]
    notes = [note for block in report.blocks for note in block.notes]
    noted = {note.partition(": ")[0] for note in notes if "scales, because" in note or "in float, because" in note}
    partner = LAYER.replace("up_proj", "gate_proj")  # engines fuse the two
    assert noted == ({LAYER} if packed else {LAYER, partner})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_that_engines_fuse_are_kept_in_float_together(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, method: str
) -> None:
    """vLLM and SGLang load no folder in which q is float and k is packed."""
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e-8
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = quantize(model, tmp_path / "out", text, method=method, format="gptq")
    left = {name for name, why in report.left.items() if "needs scales" in why or "engines fuse" in why}
    assert left == {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
