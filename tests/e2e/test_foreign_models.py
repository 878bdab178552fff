"""Models of other tools in layouts that llmq never writes: they load and compute what their files specify.

Twins with the dequantized weights are loaded as float models; logits differ by float32 rounding only.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.load import load_model
from llmq.runtime.open_skeleton import open_skeleton
from llmq.runtime.packed_linear import PackedLinear
from llmq.verification.inspection import inspect
from tests import builders, foreign, mixtures
from tests.builders import tokens

Checkpoints = Callable[..., Path]
Pack = Callable[[str, tuple[int, ...]], tuple[Mapping[str, Tensor], Tensor] | None]


def named(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def by_module(make: Callable[[tuple[int, int]], tuple[Mapping[str, Tensor], Tensor]]) -> Pack:
    """A function that packs every linear layer of the blocks."""

    def pack(name: str, shape: tuple[int, ...]) -> tuple[Mapping[str, Tensor], Tensor] | None:
        if not name.endswith("_proj.weight") or len(shape) != 2:
            return None
        tensors, weight = make((shape[0], shape[1]))
        return named(name.removesuffix(".weight"), tensors), weight

    return pack


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=ids).logits
    return output


def streamed(folder: Path, ids: Tensor) -> Tensor:
    """The logits of the checkpoint, one block at a time."""
    skeleton = open_skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    hidden = None
    for block, call in zip(skeleton.blocks, skeleton.record_all(ids), strict=True):
        block.load()
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
    with torch.no_grad():
        output: Tensor = skeleton.logits(ids, hidden)
    return output


def check(packed: Path, floats: Path) -> Any:
    """Check that the model computes the logits of its twin, as a whole and block by block; return the model."""
    ids = tokens(2, 20)
    model = load_model(packed, device="cpu")
    expected = logits(load_model(floats, device="cpu"), ids)
    for computed in (logits(model, ids), streamed(packed, ids)):
        assert (computed - expected).abs().max() <= 1e-4 * expected.abs().max()
    return model


def floats_of_four_bits(kind: str) -> dict[str, Any]:
    nv = kind == "nvfp4"
    strategy, size = ("tensor_group", 16) if nv else ("group", 32)
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 4, "type": "float"}}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_models_run_dequantized(
    checkpoint: Checkpoints, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pack = by_module(lambda shape: foreign.fp4(kind, shape))
    packed, floats = foreign.replaced(checkpoint("llama"), tmp_path, floats_of_four_bits(kind), pack)
    with caplog.at_level(logging.WARNING):
        model = check(packed, floats)
    assert f"21 weights are stored as {kind}-pack-quantized, for which llmq has no kernel" in caplog.text
    assert "the checkpoint declares quantized activations, which llmq does not apply" in caplog.text
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    layer = next(layer for layer in inspect(packed).layers if layer.name == "model.layers.0.mlp.down_proj")
    assert layer.scheme == f"{kind}-pack-quantized"
    assert layer.bits_per_weight == pytest.approx(4.5 if kind == "nvfp4" else 4.25, abs=0.02)


@pytest.mark.parametrize("group", [24, 48])
def test_unusual_group_sizes_are_split_or_dequantized(checkpoint: Checkpoints, tmp_path: Path, group: int) -> None:
    """Groups of 48 are split into groups of 16 and run packed; 24 cannot be split, and its last group is incomplete."""
    size = 48 if group == 48 else 64

    def make(shape: tuple[int, int]) -> tuple[Mapping[str, Tensor], Tensor]:
        w = foreign.weight(4, shape, size)
        return foreign.gptq(w, 1, index=False), w.exact

    settings = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": size,
        "sym": False, "data_type": "int",
    }  # fmt: skip
    hidden = 96 if group == 48 else 72
    source = checkpoint("llama", hidden_size=hidden, intermediate_size=hidden)
    packed, floats = foreign.replaced(source, tmp_path, settings, by_module(make))
    model = check(packed, floats)
    runs_packed = any(isinstance(module, PackedLinear) or hasattr(module, "rows") for module in model.modules())
    assert runs_packed == (group == 48)


def test_six_bit_models_run_packed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    def make(shape: tuple[int, int]) -> tuple[Mapping[str, Tensor], Tensor]:
        w = foreign.weight(6, shape, 32)
        return foreign.compressed(w), w.exact

    weights = {"num_bits": 6, "strategy": "group", "group_size": 32, "symmetric": False}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    packed, floats = foreign.replaced(checkpoint("llama"), tmp_path, settings, by_module(make))
    model = check(packed, floats)
    assert all(module.scheme.bits == 6 for module in model.modules() if isinstance(module, PackedLinear))


def test_gpt_oss_experts_in_mxfp4(tmp_path: Path) -> None:
    config = mixtures.gpt_oss()
    config.intermediate_size = 64  # blocks have 32 values
    source = builders.save_model(tmp_path / "source", builders.causal_model(config))
    draw = np.random.default_rng(0)

    def pack(name: str, shape: tuple[int, ...]) -> tuple[Mapping[str, Tensor], Tensor] | None:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        E, K, N = shape
        codes, exponents = draw.integers(0, 16, (E, N, K)), draw.integers(118, 126, (E, N, K // 32))
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(E, N, K // 32, 16)
        weight = foreign.E2M1[codes] * np.repeat(np.exp2(exponents - 127.0), 32, axis=-1).astype(np.float32)
        scales = torch.from_numpy(exponents.astype(np.uint8))
        tensors = {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": scales}
        return tensors, torch.from_numpy(weight).mT

    packed, floats = foreign.replaced(source, tmp_path, {"quant_method": "mxfp4"}, pack)
    check(packed, floats)
    assert {name.rpartition(".")[2] for name, _ in llmq.dequantize(packed)} == {"gate_up_proj", "down_proj"}


def test_experts_in_nvfp4(tmp_path: Path) -> None:
    source = builders.save_model(tmp_path / "source", builders.causal_model(mixtures.qwen3_moe()))
    pack = by_module(lambda shape: foreign.fp4("nvfp4", shape))
    packed, floats = foreign.replaced(source, tmp_path, floats_of_four_bits("nvfp4"), pack)
    assert any(".experts." in name for name, _ in llmq.dequantize(packed))
    check(packed, floats)
