"""Whole runs through `llmq.quantize`: what the folder holds is what the report says, and everything else is as it was."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq import job as job_module
from llmq import pipeline
from llmq.config import METHODS, QuantConfig, config_from, config_to, merged
from llmq.formats import load as load_format
from llmq.job import Job
from llmq.model import observe
from llmq.runtime.linear import PackedLinear
from tests.builders import change_json, skeleton_of, write_text

Checkpoints = Callable[..., Path]
WINDOWS: dict[str, Any] = {"samples": 4, "seqlen": 48}
FORMATS = ("compressed-tensors", "gptq", "awq")
EPSILON = 2**-24  # of a float32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "calibration.txt"))


@pytest.fixture
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def quantize(model: Path, out: Path, text: str, **settings: Any) -> llmq.Report:
    given = {"group_size": 16, "scales": "minmax", **WINDOWS, "calibration": [text], **settings}
    return llmq.quantize(str(model), out, device="cpu", **given)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=windows, use_cache=False).logits
    return result


def windows_of(model: Path, text: str) -> Tensor:
    """The (S, T) ids that a run with these settings reads."""
    settings = merged(QuantConfig(), {**WINDOWS, "calibration": [text]})
    windows: Tensor = Job(str(model), model / "nowhere", settings, device="cpu")._calibration_set().windows
    return windows


def float_model(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The model in `folder` with some of its weights replaced, run by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_the_file_holds_what_the_report_says(
    model: Path, tmp_path: Path, text: str, method: str, layout: str, symmetric: bool
) -> None:
    report = quantize(model, tmp_path / "out", text, method=method, format=layout, symmetric=symmetric)
    stored, original = tensors_of(tmp_path / "out"), tensors_of(model)
    weights = dict(llmq.dequantize(tmp_path / "out"))
    assert {f"{layer.name}.weight" for layer in report.layers} == weights.keys()
    assert len(weights) == 14
    for layer in report.layers:
        old, new = original[f"{layer.name}.weight"], weights[f"{layer.name}.weight"]
        assert layer.scheme == f"int4 g16 {'symmetric' if symmetric else 'asymmetric'}"
        packed = [tensor for name, tensor in stored.items() if name.startswith(f"{layer.name}.")]
        assert layer.bits_per_weight == pytest.approx(8 * sum(tensor.nbytes for tensor in packed) / old.numel())
        if method != "awq":  # which reports on the weight as it was folded
            assert layer.weight_error == pytest.approx(relative(new, old), rel=old.numel() * EPSILON)
    packed_model, _ = llmq.load(tmp_path / "out", device="cpu")
    linears = {path: m for path, m in packed_model.named_modules() if isinstance(m, PackedLinear)}
    assert all(torch.equal(linears[name[:-7]].quantized().dequantize(), weight) for name, weight in weights.items())
    # The same weights through plain matrix products: float32 sums of K products in another order.
    rest = {name: tensor for name, tensor in stored.items() if name in original}
    expected = logits(float_model(model, {**rest, **weights}), windows_of(model, text))
    assert relative(logits(packed_model, windows_of(model, text)), expected) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(model: Path, tmp_path: Path, text: str, bits: int) -> None:
    report = quantize(model, tmp_path / "out", text, method="gptq", bits=bits, scales="searched")
    original = tensors_of(model)
    for name, weight in llmq.dequantize(tmp_path / "out"):
        # Steps are 2 max|w| / levels, so none is off by more than about that at the ends, and half of it in between.
        step = 2 * float(original[name].abs().max()) / (2**bits - 1)
        assert float((weight - original[name]).square().mean().sqrt()) < step
    assert all(layer.scheme.startswith(f"int{bits} ") for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_everything_else_is_bit_identical(checkpoint: Checkpoints, tmp_path: Path, text: str, method: str) -> None:
    model = checkpoint("stablelm", num_hidden_layers=2, dtype="bfloat16")
    report = quantize(model, tmp_path / "out", text, method=method, skip=["v_proj", "lm_head"])
    original, stored = tensors_of(model), tensors_of(tmp_path / "out")
    replaced = {f"{layer.name}.weight" for layer in report.layers}
    kept = original.keys() - replaced
    assert kept <= stored.keys() and not replaced & stored.keys()
    changed = {
        name
        for name in kept
        if stored[name].dtype != original[name].dtype or not torch.equal(stored[name], original[name])
    }
    if method == "awq":  # what it folds into, and nothing else
        assert changed and all("layernorm" in name or ".v_proj." in name for name in changed)
        assert all(name.startswith("model.layers.") for name in changed)
    else:
        assert not changed


def test_companions_are_copied_and_the_configuration_keeps_its_keys(model: Path, tmp_path: Path, text: str) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    change_json(source / "config.json", key_of_somebody={"a": [1, None, "ü"]}, dtype="float32")
    for name in ("chat_template.jinja", "LICENSE", "README.md", "notes.txt"):
        (source / name).write_bytes(f"{name} \xff\r\n".encode("latin-1"))
    (source / "training_state.pt").write_bytes(b"not about the model")
    quantize(source, tmp_path / "out", text, method="rtn", format="gptq")
    copied = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors", "training_state.pt"}
    assert {"tokenizer.json", "generation_config.json", "LICENSE"} <= copied
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    written = {path.name for path in (tmp_path / "out").iterdir()} - copied
    assert written == {"config.json", "model.safetensors", "llmq.json", "quantize_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_provenance(model: Path, tmp_path: Path, text: str) -> None:
    report = quantize(model, tmp_path / "out", text, method="gptq", seed=3)
    written = json.loads((tmp_path / "out" / "llmq.json").read_text())
    assert written["versions"]["llmq"] == llmq.__version__
    settings = {"method": "gptq", "group_size": 16, "scales": "minmax", "seed": 3, "calibration": [text], **WINDOWS}
    assert config_from(written["settings"]) == merged(QuantConfig(), settings)
    assert written["settings"] == json.loads(json.dumps(config_to(merged(QuantConfig(), settings))))
    job = Job(str(model), tmp_path / "other", merged(QuantConfig(), settings), device="cpu")
    ids = job._calibration_set().windows.numpy().astype("<i8").tobytes()
    assert written["calibration"]["sha256"] == hashlib.sha256(ids).hexdigest()
    assert written["calibration"]["tokens"] == 4 * 48
    layers = [layer for block in written["blocks"] for layer in block["layers"]]
    assert [layer["name"] for layer in layers] == [layer.name for layer in report.layers]
    assert all(0 < layer["output_error"] < 1 and 0 < layer["weight_error"] < 1 for layer in layers)
    assert all(layer["tokens"] == 4 * 48 and layer["damping"] >= 0.01 for layer in layers)
    weights = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert written["file_bytes"] == report.file_bytes == weights
    bits = sum(layer.bits_per_weight * size for layer, size in zip(report.layers, _sizes(model, report), strict=True))
    assert report.bits_per_weight == pytest.approx(bits / sum(_sizes(model, report)))


def _sizes(model: Path, report: llmq.Report) -> list[int]:
    original = tensors_of(model)
    return [original[f"{layer.name}.weight"].numel() for layer in report.layers]


def test_overrides_and_skips_are_honoured_and_reported(model: Path, tmp_path: Path, text: str) -> None:
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


def test_a_group_size_that_does_not_divide_falls_back_and_is_reported(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    model = checkpoint("llama", num_hidden_layers=1, intermediate_size=48)
    report = quantize(model, tmp_path / "out", text, method="gptq", group_size=32)
    schemes = {layer.name.rpartition(".")[2]: layer.scheme for layer in report.layers}
    assert schemes["down_proj"] == "int4 g16 symmetric" and schemes["up_proj"] == "int4 g32 symmetric"
    with pytest.raises(llmq.LlmqError, match="16 instead of 32"):
        quantize(model, tmp_path / "strict", text, method="gptq", group_size=32, strict=True)


def test_a_layer_that_never_ran_stays_float(
    model: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = observe.input_groups

    def without_one(*arguments: Any) -> list[observe.InputGroup]:
        return [group for group in found(*arguments) if group.names != ("model.layers.0.mlp.down_proj",)]

    monkeypatch.setattr(observe, "input_groups", without_one)
    report = quantize(model, tmp_path / "out", text, method="gptq")
    name = "model.layers.0.mlp.down_proj"
    assert report.left[name] == "it never ran on the calibration text"
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}.weight"], tensors_of(model)[f"{name}.weight"])
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    assert isinstance(loaded.get_submodule(name), torch.nn.Linear)
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.down_proj"), PackedLinear)


@pytest.mark.parametrize("method", METHODS)
def test_shards_make_no_difference(model: Path, tmp_path: Path, text: str, method: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    sharded = shutil.copytree(model, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for source in (model, sharded):
        quantize(source, tmp_path / f"out-{source == model}", text, method=method)
    whole, parts = (tensors_of(tmp_path / f"out-{single}") for single in (True, False))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list((tmp_path / "out-False").glob("*.index.json"))


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_awq_keeps_the_function_that_it_folds(checkpoint: Checkpoints, tmp_path: Path, text: str, name: str) -> None:
    model = checkpoint(name, num_hidden_layers=2, **_layers_of(name))
    quantize(model, tmp_path / "awq", text, method="awq", bits=8)
    quantize(model, tmp_path / "rtn", text, method="rtn", bits=8)
    original, stored = tensors_of(model), tensors_of(tmp_path / "awq")
    norms = [key for key in original if "layers.0." in key and "norm" in key]
    assert any(not torch.equal(stored[key], original[key]) for key in norms)  # something was folded
    windows = windows_of(model, text)
    expected = logits(float_model(model, {}), windows)
    distance = {method: relative(logits(llmq.load(tmp_path / method, device="cpu")[0], windows), expected)
                for method in ("awq", "rtn")}  # fmt: skip
    # Rounding to 255 levels is all that may differ: rtn shows how much that is, a wrong folding is of the order of 1.
    assert distance["awq"] < 1.5 * distance["rtn"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_awq_lowers_the_error_of_the_model(checkpoint: Checkpoints, tmp_path: Path, text: str, name: str) -> None:
    model = checkpoint(name, num_hidden_layers=2, **_layers_of(name))
    windows = windows_of(model, text)
    expected = logits(float_model(model, {}), windows)
    distance = {}
    for method in ("awq", "rtn"):
        quantize(model, tmp_path / method, text, method=method, bits=3, scales="searched")
        distance[method] = relative(logits(llmq.load(tmp_path / method, device="cpu")[0], windows), expected)
    assert distance["awq"] < distance["rtn"]


def _layers_of(name: str) -> dict[str, Any]:
    return {"layer_types": ("sliding_attention", "full_attention")} if name == "gemma3" else {}


def test_gptq_lowers_the_output_error_of_every_layer(model: Path, tmp_path: Path, text: str) -> None:
    """Of the first block at least: the inputs of the others differ."""
    errors = {}
    for method in ("gptq", "awq"):
        report = quantize(model, tmp_path / method, text, method=method)
        errors[method] = {layer.name: layer.error for layer in report.blocks[0].layers}
    nearest = nearest_errors(model, text)
    assert all(errors["gptq"][name] < nearest[name] for name in nearest)


def nearest_errors(model: Path, text: str) -> dict[str, float]:
    """‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ of plain rounding, for the first block, from inputs that hooks saw."""
    walked, windows = skeleton_of(model), windows_of(model, text)
    block = walked.blocks[0]
    block.load()
    groups = observe.input_groups(block, walked.record(0, windows))
    inputs, _ = observe.inputs_of(block, groups, walked.record(0, windows))
    errors = {}
    for group in groups:
        X = inputs[group].flatten(0, -2)  # (T, K)
        for path in group.names:
            W = block.weight(path)
            scales = W.reshape(len(W), -1, 16).abs().amax(-1, keepdim=True) / 7.5
            rounded = ((W.reshape(len(W), -1, 16) / scales + 8).round().clamp(0, 15) - 8) * scales
            errors[path] = relative(X @ rounded.reshape(W.shape).T, X @ W.T)
    return errors


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_block_is_observed_behind_the_quantized_ones(
    model: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen: list[Tensor] = []
    original = observe.statistics

    def spy(block: Any, groups: Any, calls: Any) -> Any:
        kept = list(calls)
        seen.append(torch.cat([call.hidden for call in kept]))
        return original(block, groups, kept)

    monkeypatch.setattr(observe, "statistics", spy)
    quantize(model, tmp_path / "out", text, method=method)
    windows = windows_of(model, text)
    hidden = {}
    for name, weights in (("float", {}), ("quantized", _equivalent(tmp_path / "out", model))):
        embedded = float_model(model, weights)
        with torch.no_grad():
            hidden[name] = embedded.model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(seen[0], hidden["float"][0])
    assert relative(seen[1], hidden["quantized"][1]) < 1e-5
    assert relative(hidden["float"][1], hidden["quantized"][1]) > 1e-2  # it makes a difference which


def _equivalent(out: Path, model: Path) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors_of(out).items() if name in tensors_of(model)}
    return {**kept, **dict(llmq.dequantize(out))}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_inputs_of_each_block_are_quantized_whole(
    checkpoint: Checkpoints, tmp_path: Path, text: str, method: str
) -> None:
    model = checkpoint("gemma3n")
    report = quantize(model, tmp_path / "out", text, method=method)
    assert all(math.isfinite(layer.error) for layer in report.layers)
    undone = [note for block in report.blocks for note in block.notes if "undone" in note]
    assert bool(undone) == (method == "awq")  # its blocks use the output of a norm outside of the weights, too


@pytest.mark.parametrize(("method", "dtype"), [("awq", torch.float32), ("gptq", torch.bfloat16)])
def test_foldings_are_looked_for_in_single_precision_on_any_device(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(job_module, "choose_device", lambda _: torch.device("cuda"))
    settings = merged(QuantConfig(), {"method": method, "group_size": 16})
    job = Job(str(checkpoint("llama", dtype="bfloat16")), tmp_path / "out", settings)
    assert {parameter.dtype for parameter in job._skeleton.model.parameters()} == {dtype}
