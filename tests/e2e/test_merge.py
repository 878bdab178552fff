"""`llmq merge`: a LoRA adapter in the files of PEFT, merged into a float model and into a quantized one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llmq
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.report.stored_record import read_report
from llmq.training.adapter import PREFIX, Adapter
from llmq.training.merge import like_base, merge
from tests import builders
from tests.command_line import llmq as run
from tests.runs import QUICK, tensors_of

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
TEXT = ("--samples", "16", "--seqlen", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = builders.causal_model(builders.llama(num_hidden_layers=2), dtype="bfloat16")
    return builders.save_model(tmp_path_factory.mktemp("model"), made)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two widths, a layer in float, and a format that is not the default."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    settings = {**QUICK, "skip": ["layers.0.mlp.up_proj"], "overrides": ["v_proj:bits=8"], "format": "gptq"}
    llmq.quantize(model, out, method="rtn", **settings)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_text(tmp_path_factory.mktemp("text") / "text.txt", 3000)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """`adapter(use_rslora=True)`: a folder with an adapter on two layers."""

    def make(rename: Callable[[str], str] = str, **changes: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for path, (N, K) in {Q: (32, 32), DOWN: (32, 64)}.items():
            tensors[rename(f"{PREFIX}{path}.lora_A.weight")] = torch.randn(4, K, generator=generator) * K**-0.5
            tensors[rename(f"{PREFIX}{path}.lora_B.weight")] = torch.randn(N, 4, generator=generator) * 0.2
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
        return folder

    return make


def product(folder: Path, path: str) -> Tensor:
    """B A, (N, K) float32."""
    tensors = tensors_of(folder)
    return tensors[f"{PREFIX}{path}.lora_B.weight"] @ tensors[f"{PREFIX}{path}.lora_A.weight"]


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 2}}, (0.5, 2.0)),
        ({"alpha_pattern": {DOWN: 16}, "init_lora_weights": "gaussian"}, (2.0, 4.0)),
    ],
    ids=str,
)
def test_change_is_the_scaled_product(adapter: Any, changes: dict[str, Any], factors: tuple[float, float]) -> None:
    folder = adapter(**changes)
    opened = Adapter.open(folder)
    for path, factor in zip((Q, DOWN), factors, strict=True):
        assert torch.allclose(opened.change(path), factor * product(folder, path))


def test_quantized_base_keeps_the_values_of_all_other_layers(
    quantized: Path, adapter: Any, text: Path, tmp_path: Path
) -> None:
    folder, out = adapter(), tmp_path / "out"
    done = run("merge", quantized, folder, out, "--calibration", text, *TEXT, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    before, after = dict(llmq.dequantize(quantized)), dict(llmq.dequantize(out))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        path = name.removesuffix(".weight")
        if path in (Q, DOWN):
            merged = before[name] + 2 * product(folder, path)
            assert 0 < (weight - merged).norm() / merged.norm() < 0.25
            assert (weight - merged).norm() < (before[name] - merged).norm()
        else:
            assert torch.equal(weight, before[name])
    report = read_report(out)
    assert any("merged into 2 layers" in note for note in report.notes)
    assert report.verdict is not None and report.verdict.kl is not None and report.verdict.kl_rtn is not None
    assert "quality on" in done.stdout and report.source == str(quantized)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert not list(tmp_path.glob(".out-merged"))


def test_grids_of_the_base_are_those_of_the_merge(model: Path, adapter: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    overrides = ["v_proj:bits=fp8", "o_proj:bits=nvfp4", "k_proj:bits=8,group_size=channel,activations=int8"]
    llmq.quantize(model, base, method="rtn", **QUICK, overrides=overrides)
    settings = like_base(base, llmq.QuantConfig(method="rtn"))
    for name, grid in {"q": "int4 g16 symmetric", "v": "fp8", "o": "nvfp4", "k": "int8 channel symmetric"}.items():
        assert str(settings.scheme_for(f"model.layers.0.self_attn.{name}_proj")) == grid
    inputs = [settings.inputs_for(f"model.layers.1.self_attn.{name}_proj") for name in "kq"]
    assert str(inputs[0]) == "int8 dynamic per token" and inputs[1] is None
    report = merge(base, adapter(), tmp_path / "out", settings, device="cpu")
    [note] = [note for note in report.notes if "rounded again" in note]
    assert "nvfp4" in note and "also those that the adapter does not change" in note
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    kept = [name for name in before if "v_proj" in name or "k_proj" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_folder_of_a_killed_merge_is_replaced(quantized: Path, adapter: Any, tmp_path: Path) -> None:
    left = tmp_path / ".out-merged" / "model" / "part-00009.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    merge(quantized, adapter(), tmp_path / "out", like_base(quantized, llmq.QuantConfig(method="rtn")), device="cpu")
    assert not left.parent.parent.exists()


def test_float_base_equals_quantizing_the_merged_model(model: Path, adapter: Any, tmp_path: Path) -> None:
    folder = adapter()
    settings = llmq.QuantConfig(method="rtn", scheme=llmq.WeightScheme(4, 16))
    merge(model, folder, tmp_path / "out", settings, device="cpu")
    merged = builders.causal_model(builders.llama(num_hidden_layers=2), dtype="bfloat16")
    for path in (Q, DOWN):
        weight = merged.get_submodule(path).weight
        weight.data.copy_((weight.float() + 2 * product(folder, path)).to(torch.bfloat16))
    by_hand = builders.save_model(tmp_path / "merged", merged)
    llmq.quantize(by_hand, tmp_path / "expected", config=settings, device="cpu", validate=0)
    ours, expected = (dict(llmq.dequantize(tmp_path / name)) for name in ("out", "expected"))
    assert all(torch.equal(weight, ours[name]) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"alpha_pattern": {"(q|k)_proj": 2}}, "alpha_pattern"),
        ({"rename": lambda name: name.replace("lora_A", "lora_embedding_A")}, "does not belong to a pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_adapters_are_refused_by_name(adapter: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        Adapter.open(adapter(**changes))
    assert "merge_and_unload" in caught.value.hint


def test_adapters_of_other_models_are_refused(model: Path, adapter: Any, tmp_path: Path) -> None:
    for rename, match in (
        (lambda name: name.replace("layers.1", "layers.7"), "which the model does not have"),
        (lambda name: name.replace("down_proj", "up_proj"), "but the adapter adds"),
    ):
        with pytest.raises(CheckpointError, match=match):
            merge(model, adapter(rename), tmp_path / "out", device="cpu")
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        Adapter.open(model)
    with pytest.raises(CheckpointError, match="expected a number"):
        Adapter.open(adapter(lora_alpha="8"))
    assert not list(tmp_path.glob(".out-merged"))
