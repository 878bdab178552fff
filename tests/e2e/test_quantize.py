"""Whole runs of `llmq.quantize`: the folder matches the report, and all other tensors and files are unchanged."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmq
from llmq.config import QuantConfig
from llmq.formats import load as load_format
from llmq.methods import METHODS, Method
from llmq.model.analyse import input_groups
from llmq.runtime.fused_linear import FusedLinear
from llmq.runtime.packed_linear import PackedLinear
from llmq.setting_fields import config_to, merged
from tests.builders import change_json
from tests.runs import (
    QUICK,
    TIMED,
    WINDOWS,
    float_equivalent,
    float_model,
    job,
    logits,
    quantize,
    read_text,
    relative,
    tensors_of,
    windows_of,
)

Checkpoints = Callable[..., Path]
FORMATS = ("compressed-tensors", "gptq", "awq")
EPSILON = 2**-24  # float32


@pytest.fixture
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def short(method: str) -> Method:
    """The stages of a method, with only a few steps of tuning, which is enough for these tests."""
    stages = METHODS[method]
    tuned = {name: getattr(stages, name) for name in ("block_tuning", "tuning")}
    return dataclasses.replace(stages, **{n: t and dataclasses.replace(t, steps=6) for n, t in tuned.items()})


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_the_file_matches_the_report(
    model: Path, tmp_path: Path, text: Path, method: str, layout: str, symmetric: bool
) -> None:
    stages = short(method)
    report = quantize(model, tmp_path / "out", text, stages=stages, format=layout, symmetric=symmetric)
    stored, original = tensors_of(tmp_path / "out"), tensors_of(model)
    weights = dict(llmq.dequantize(tmp_path / "out"))
    assert {f"{layer.name}.weight" for layer in report.layers} == weights.keys()
    assert len(weights) == 14
    for layer in report.layers:
        old, new = original[f"{layer.name}.weight"], weights[f"{layer.name}.weight"]
        assert layer.scheme == f"int4 g16 {'symmetric' if symmetric else 'asymmetric'}"
        packed = [tensor for name, tensor in stored.items() if name.startswith(f"{layer.name}.")]
        assert layer.bits_per_weight == pytest.approx(8 * sum(tensor.nbytes for tensor in packed) / old.numel())
        if method != "awq" and stages.block_tuning is None:  # these report the error of the folded or untuned weight
            assert layer.weight_error == pytest.approx(relative(new, old), rel=old.numel() * EPSILON)
    packed_model, _ = llmq.load(tmp_path / "out", device="cpu")
    linears = {path: m for path, m in packed_model.named_modules() if isinstance(m, PackedLinear | FusedLinear)}
    assert all(torch.equal(linears[name[:-7]].quantized().dequantize(), weight) for name, weight in weights.items())
    # The same weights in plain matrix products: float32 sums of K products in another order.
    expected = logits(float_model(model, float_equivalent(tmp_path / "out", model)), windows_of(model, text))
    assert relative(logits(packed_model, windows_of(model, text)), expected) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(model: Path, tmp_path: Path, text: Path, bits: int) -> None:
    report = quantize(model, tmp_path / "out", text, method="gptq", bits=bits, scales="searched")
    original = tensors_of(model)
    for name, weight in llmq.dequantize(tmp_path / "out"):
        # Steps are 2 max|w| / levels: the error is at most about one step at the ends, and half a step in between.
        step = 2 * float(original[name].abs().max()) / (2**bits - 1)
        assert float((weight - original[name]).square().mean().sqrt()) < step
    assert all(layer.scheme.startswith(f"int{bits} ") for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_other_tensors_are_bit_identical(checkpoint: Checkpoints, tmp_path: Path, text: Path, method: str) -> None:
    model = checkpoint("stablelm", num_hidden_layers=2, dtype="bfloat16")
    report = quantize(model, tmp_path / "out", text, stages=short(method), skip=["o_proj", "lm_head"])
    original, stored = tensors_of(model), tensors_of(tmp_path / "out")
    replaced = {f"{layer.name}.weight" for layer in report.layers}
    kept = original.keys() - replaced
    assert kept <= stored.keys() and not replaced & stored.keys()
    changed = {
        name
        for name in kept
        if stored[name].dtype != original[name].dtype or not torch.equal(stored[name], original[name])
    }
    if method == "awq":  # only the tensors that scales are folded into
        assert changed and all("layernorm" in name for name in changed)
        assert all(name.startswith("model.layers.") for name in changed)
    else:
        assert not changed


def test_other_files_are_copied_and_the_config_keeps_its_keys(model: Path, tmp_path: Path, text: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    change_json(source / "config.json", key_of_somebody={"a": [1, None, "ü"]}, dtype="float32")
    for name in ("chat_template.jinja", "LICENSE", "README.md", "notes.txt"):
        (source / name).write_bytes(f"{name} \xff\r\n".encode("latin-1"))
    (source / "training_state.pt").write_bytes(b"not about the model")
    quantize(source, tmp_path / "out", text, method="rtn", format="gptq")
    left = {"config.json", "model.safetensors", "training_state.pt", "README.md"}
    copied = {path.name for path in source.iterdir()} - left
    assert {"tokenizer.json", "generation_config.json", "LICENSE"} <= copied
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    written = {path.name for path in (tmp_path / "out").iterdir()} - copied
    assert written == {"config.json", "model.safetensors", *TIMED, "quantize_config.json", "README.md",
                       "README.original.md"}  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_provenance(model: Path, tmp_path: Path, text: Path) -> None:
    report = quantize(model, tmp_path / "out", text, method="gptq", seed=3)
    written = json.loads((tmp_path / "out" / "llmq.json").read_text())
    assert written["versions"]["llmq"] == llmq.__version__
    asked = merged(QuantConfig(), {**QUICK, "method": "gptq", "seed": 3, "calibration": [text]})
    assert QuantConfig.model_validate(written["settings"]) == asked
    assert written["settings"] == json.loads(json.dumps(config_to(asked)))
    windows = read_text(job(model, tmp_path / "other", text, seed=3)).windows
    ids = windows.numpy().astype("<i8").tobytes()
    assert written["calibration"]["sha256"] == hashlib.sha256(ids).hexdigest()
    assert written["calibration"]["tokens"] == WINDOWS["samples"] * WINDOWS["seqlen"]
    layers = [layer for block in written["blocks"] for layer in block["layers"]]
    assert [layer["name"] for layer in layers] == [layer.name for layer in report.layers]
    assert all(0 < layer["output_error"] < 1 and 0 < layer["weight_error"] < 1 for layer in layers)
    assert all(layer["tokens"] == written["calibration"]["tokens"] and layer["damping"] >= 0.01 for layer in layers)
    weights = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert written["file_bytes"] == report.file_bytes == weights
    bits = sum(layer.bits_per_weight * size for layer, size in zip(report.layers, _sizes(model, report), strict=True))
    assert report.bits_per_weight == pytest.approx(bits / sum(_sizes(model, report)))


def _sizes(model: Path, report: llmq.Report) -> list[int]:
    original = tensors_of(model)
    return [original[f"{layer.name}.weight"].numel() for layer in report.layers]


def test_overrides_and_skips_are_applied_and_reported(model: Path, tmp_path: Path, text: Path) -> None:
    report = quantize(
        model, tmp_path / "out", text, method="rtn",
        skip=["k_proj"], overrides=["down_proj:bits=8,group_size=32", "re:layers\\.1\\..*gate:symmetric=false"],
    )  # fmt: skip
    schemes = {layer.name: layer.scheme for layer in report.layers}
    for index in (0, 1):
        layer = f"model.layers.{index}"
        assert f"{layer}.self_attn.k_proj" not in schemes
        assert report.left[f"{layer}.self_attn.k_proj"] == "skipped on request"
        assert schemes[f"{layer}.mlp.down_proj"] == "int8 g32 symmetric"
        assert schemes[f"{layer}.mlp.gate_proj"] == f"int4 g16 {'a' if index else ''}symmetric"
        assert schemes[f"{layer}.mlp.up_proj"] == "int4 g16 symmetric"
    assert report.left["lm_head"] == report.left["model.embed_tokens"] == "outside the blocks"
    stored = tensors_of(tmp_path / "out")
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (32, 2)
    assert "model.layers.1.mlp.gate_proj.weight_zero_point" in stored
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    reader = load_format("compressed-tensors").read_config(settings)
    for name, scheme in schemes.items():
        reading = reader(name)
        assert reading is not None and str(reading.scheme) == scheme
    assert reader("model.layers.0.self_attn.k_proj") is None and reader("lm_head") is None
    llmq.load(tmp_path / "out", device="cpu")


def test_a_group_size_that_does_not_divide_is_reduced_and_noted(
    checkpoint: Checkpoints, tmp_path: Path, text: Path
) -> None:
    model = checkpoint("llama", num_hidden_layers=1, intermediate_size=48)
    report = quantize(model, tmp_path / "out", text, method="gptq", group_size=32)
    schemes = {layer.name.rpartition(".")[2]: layer.scheme for layer in report.layers}
    assert schemes["down_proj"] == "int4 g16 symmetric" and schemes["up_proj"] == "int4 g32 symmetric"
    with pytest.raises(llmq.LlmqError, match="16 instead of 32"):
        quantize(model, tmp_path / "strict", text, method="gptq", group_size=32, strict=True)


def test_a_layer_that_never_ran_is_kept_in_float(
    model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_groups = input_groups.input_groups

    def without_one(*arguments: Any) -> list[input_groups.InputGroup]:
        return [group for group in all_groups(*arguments) if group.names != ("model.layers.0.mlp.down_proj",)]

    monkeypatch.setattr(input_groups, "input_groups", without_one)
    report = quantize(model, tmp_path / "out", text, method="gptq")
    name = "model.layers.0.mlp.down_proj"
    assert report.left[name] == "it was not run for the first 64 calibration tokens"
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}.weight"], tensors_of(model)[f"{name}.weight"])
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    assert isinstance(loaded.get_submodule(name), torch.nn.Linear)
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.down_proj"), PackedLinear)


@pytest.mark.parametrize("method", METHODS)
def test_shards_do_not_change_the_result(model: Path, tmp_path: Path, text: Path, method: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    sharded = shutil.copytree(model, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for source in (model, sharded):
        quantize(source, tmp_path / f"out-{source == model}", text, stages=short(method))
    whole, parts = (tensors_of(tmp_path / f"out-{single}") for single in (True, False))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list((tmp_path / "out-False").glob("*.index.json"))
