"""Layers that their grid or their method cannot hold: each step of the repair, and what the report tells."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq import formats
from llmq.algorithms import Options
from llmq.methods import METHODS
from llmq.numerics.input_stats import InputStats
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.report.record import BlockReport
from llmq.steps import repair
from llmq.steps.round_group import round_group
from tests.runs import job, quantize, stop, tensors_of, weights

Checkpoints = Callable[..., Path]
G64, G32 = WeightScheme(4, 64), WeightScheme(4, 32)
K = "model.layers.0.self_attn.k_proj"


def plan(scheme: WeightScheme, in_features: int = 128) -> LayerPlan:
    return LayerPlan("layer", 64, in_features, Scheme(scheme))


def steps(scheme: WeightScheme, format_: str, in_features: int = 128) -> list[str]:
    """The grids that follow one another until float."""
    layer, grids = plan(scheme, in_features), []
    while layer.scheme.weights is not None:
        layer = layer.with_weights(repair.next_scheme([layer], formats.load(format_)), "")
        grids.append(str(layer.scheme))
    return grids


@pytest.mark.parametrize(
    ("scheme", "format_", "expected"),
    [
        (WeightScheme(4, 128), "gptq", ["int4 g32 symmetric", "int8 g32 symmetric", "float"]),
        (WeightScheme(3, "channel", False), "compressed-tensors",
         ["int3 g32 asymmetric", "int8 g32 asymmetric", "float"]),
        (WeightScheme(8, 32), "mlx", ["float"]),
        (WeightScheme(4, 128, False), "awq", ["float"]),  # one grid for all layers
        (WeightScheme.of_blocks("q4_k"), "gguf", ["q8_0", "float"]),
    ],
)  # fmt: skip
def test_the_order_of_the_grids(scheme: WeightScheme, format_: str, expected: list[str]) -> None:
    assert steps(scheme, format_, 256) == expected


@pytest.mark.parametrize(
    "scheme", ["int4 g64 symmetric", "int4 g32 symmetric", "int8 g64 symmetric", "int8 g32 symmetric"]
)
def test_the_grid_of_a_repaired_layer_is_known_when_a_run_continues(scheme: str) -> None:
    assert str(repair.restored(plan(G64), scheme).scheme) == scheme


# ---- rounding to nearest


def statistics(tokens: int, K: int = 64, validation: int = 0) -> InputStats:
    stats, generator = InputStats(K, torch.device("cpu")), torch.Generator().manual_seed(1)
    stats.update(torch.randn(tokens, K, generator=generator))
    if validation:
        stats.begin_validation().update(torch.randn(validation, K, generator=generator))
    return stats


def notes_of(stats: InputStats, method: str = "gptq") -> tuple[torch.Tensor, tuple[str, ...]]:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    [layer] = round_group({"layer": weight}, {"layer": G32}, stats, METHODS[method], Options(damping=1e-3))
    return layer.rounding.quantized.dequantize(), layer.rounding.notes


def test_a_method_that_is_worse_on_other_text_gives_way_to_rounding_to_nearest() -> None:
    few = statistics(4, validation=512)
    result, notes = notes_of(few)
    assert notes == (
        "4 tokens for 64 inputs: more text would make it better",
        "rounded to nearest, because gptq was worse on validation tokens",
    )
    assert torch.equal(result, notes_of(few, "rtn")[0])


def test_statistics_of_enough_tokens_are_not_doubted() -> None:
    assert notes_of(statistics(256, validation=64))[1] == ()


# ---- grids


def spoiled(checkpoint: Checkpoints, folder: Path, columns: list[int], quiet: list[int], size: float) -> Path:
    """A model in which `columns` of the weight K have large values and `quiet` ones of its input are almost zero.

    So the large values decide about the scales of their groups, but hardly about the output.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = shutil.copytree(checkpoint("llama", **sizes), folder)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{K}.weight"][:, columns] = size * tensors[f"{K}.weight"].std()
    tensors["model.layers.0.input_layernorm.weight"][quiet] = 1e-4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("format_", "columns", "quiet", "size", "expected"),
    [
        ("gptq", [0], list(range(32)), 60.0, "int4 g32 symmetric"),
        ("compressed-tensors", [0, 32], [0, 1, 2, 3, 32], 150.0, "int8 g32 symmetric"),
        ("mlx", [0, 32], [0, 32], 1e5, "float"),
    ],
)
def test_a_lost_layer_and_its_partners_get_another_grid(
    checkpoint: Checkpoints, text: Path, tmp_path: Path,
    format_: str, columns: list[int], quiet: list[int], size: float, expected: str,
) -> None:  # fmt: skip
    """Also in a run that is stopped after the first block and continues."""
    model = spoiled(checkpoint, tmp_path / "model", columns, quiet, size)
    settings = {"method": "gptq", "format": format_, "group_size": 64}
    report = quantize(model, tmp_path / "whole", text, **settings)
    grids = {layer.name: layer.scheme for layer in report.layers}
    assert {grids.get(K.replace("k_proj", f"{part}_proj"), "float") for part in "qkv"} == {expected}
    assert grids["model.layers.0.mlp.up_proj"] == "int4 g64 symmetric"
    notes = [note for block in report.blocks for note in block.notes]
    start = "kept in float" if expected == "float" else f"{expected} instead of"
    assert any(note.startswith(f"{K}: {start}") and "of its output would be lost" in note for note in notes)

    stop(job(model, tmp_path / "cut", text, **settings).run, lambda event: isinstance(event, BlockReport))
    assert quantize(model, tmp_path / "cut", text, **settings).left == report.left
    whole, cut = (tensors_of(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert len({(tmp_path / name / "config.json").read_text() for name in ("whole", "cut")}) == 1
    inputs = torch.randn(64, 64) * load_file(model / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    original = load_file(model / "model.safetensors")[f"{K}.weight"]
    stored = weights(tmp_path / "whole").get(f"{K}.weight", original)  # without those in float
    assert (inputs @ (original - stored).T).norm() < repair.LOST * (inputs @ original.T).norm()


def test_scales_that_are_too_large_for_4_bits_may_fit_with_8(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"{K}.weight"] *= 2e6 / tensors[f"{K}.weight"].abs().max()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = quantize(model, tmp_path / "out", text, method="rtn", format="gptq", group_size=32)
    grids = {layer.name: layer.scheme for layer in report.layers}
    assert grids[K] == "int8 g32 symmetric"
