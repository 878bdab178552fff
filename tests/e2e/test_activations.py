"""`llmq eval --activations int8`, compared with transformers and a hook on each linear layer; refused requests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError, UnsupportedModelError
from llmq.evaluation import streaming
from llmq.evaluation.activations import quantize_inputs
from llmq.evaluation.measure import measure
from llmq.gguf import reader
from llmq.job import Job
from llmq.methods import METHODS
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.report.record import BlockReport
from llmq.runtime.load import load_model
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders, mixtures
from tests.command_line import ROOT
from tests.command_line import llmq as run_llmq
from tests.faults.refusals import CONFIG, refused

MODEL = ROOT / "eval" / "models" / "tiny-python-llama"
INT8 = InputScheme("int8", "dynamic")
W8A8: dict[str, Any] = {"preset": "w8a8", "method": "rtn", "device": "cpu"}
SIZE: dict[str, Any] = {"seqlen": 32, "limit": 4, "device": "cpu"}
Checkpoints = Callable[..., Path]


def round_inputs(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Round the inputs of the linear layers whose names `wanted` selects, as W8A8 engines do."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        scale = args[0].abs().max(dim=-1, keepdim=True).values / 127.5
        return (torch.clamp(torch.round(args[0] / scale), -128, 127) * scale,)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and wanted(name):
            module.register_forward_pre_hook(hook)


def log_probabilities(folder: Path, windows: Tensor, activations: str = "file") -> Tensor:
    source = streaming.open_source(folder, torch.device("cpu"), activations=activations)
    source.run(windows)
    return torch.cat([logits for _, logits in source.logits(len(windows))]).log_softmax(-1)


@torch.no_grad()
def test_rounded_inputs_give_the_logits_of_transformers() -> None:
    windows = builders.tokens(2, 48)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    plain = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    round_inputs(model, lambda name: True)
    expected = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    computed = log_probabilities(MODEL, windows, "int8")
    assert (computed - expected).abs().max() < 1e-4 < 1e-2 < (computed - plain).abs().max()
    assert (log_probabilities(MODEL, windows) - plain).abs().max() < 1e-4


@torch.no_grad()
def test_only_inputs_of_quantized_layers_are_rounded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Inputs of layers that the file holds in float are not rounded."""
    out, windows = tmp_path / "out", builders.tokens(2, 24)
    llmq.quantize(
        checkpoint("llama"), out, method="rtn", bits=8, group_size="channel", skip=["down_proj"], device="cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    model.load_state_dict(dict(llmq.dequantize(out)), strict=False)
    round_inputs(model, lambda name: not name.endswith("down_proj"))
    expected = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    assert (log_probabilities(out, windows, "int8") - expected).abs().max() < 1e-4


def test_the_rounded_layers_are_the_quantized_layers_of_the_file(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Also for a .gguf file; all linear layers for a float model."""
    model, out = checkpoint("llama"), tmp_path / "out"
    llmq.quantize(
        model, out, method="rtn", group_size=32, scales="minmax", device="cpu", skip=["down_proj"],
        format="compressed-tensors,gguf",
    )  # fmt: skip
    device = torch.device("cpu")
    packed = open_skeleton(Checkpoint.open(out / "compressed-tensors"), device, torch.float32)
    in_file = reader.open_skeleton(out / "gguf" / "out.gguf", device, torch.float32, None)
    plain = open_skeleton(Checkpoint.open(model), device, torch.float32)
    for skeleton in (packed, in_file, plain):
        quantize_inputs(skeleton, "int8")
        paths = {path for block in skeleton.blocks for path in block.linears}
        wanted = paths if skeleton is plain else {path for path in paths if not path.endswith("down_proj")}
        assert {path for block in skeleton.blocks for path in block.inputs.schemes} == wanted


def test_the_original_keeps_float_inputs(checkpoint: Checkpoints, text: Path) -> None:
    model = checkpoint("llama")
    plain, rounded = measure(model, model, text, **SIZE), measure(model, model, text, **SIZE, activations="int8")
    assert (plain.activations, rounded.activations) == ("none", "int8 dynamic per token")
    assert plain.original == rounded.original
    assert plain.model.kl_mean == 0 and rounded.model.kl_mean is not None and rounded.model.kl_mean > 1e-6
    alone = measure(model, None, text, **SIZE, activations="int8")
    assert alone.model.perplexity == rounded.model.perplexity != plain.model.perplexity


def test_the_command_states_what_was_rounded(checkpoint: Checkpoints, text: Path) -> None:
    request = ("eval", checkpoint("llama"), "--text", text, "--seqlen", "32", "--windows", "2")
    done = run_llmq(*request, "--activations", "int8")
    assert done.exit_code == 0 and "inputs in int8 dynamic per token" in " ".join(done.stdout.split())
    assert "int8" not in run_llmq(*request).stdout
    assert (
        json.loads(run_llmq(*request, "--activations", "int8", "--json").stdout)["activations"]
        == "int8 dynamic per token"
    )
    assert json.loads(run_llmq(*request, "--json").stdout)["activations"] == "none"
    refused(run_llmq(*request, "--activations", "fp4"), CONFIG, "activations is 'fp4', expected one of", "")


def test_unknown_activations_are_refused(checkpoint: Checkpoints, text: Path) -> None:
    with pytest.raises(ConfigError, match="activations is 'int4', expected one of"):
        measure(checkpoint("llama"), None, text, **SIZE, activations="int4")


def test_a_model_that_cannot_be_streamed_is_refused(checkpoint: Checkpoints, text: Path) -> None:
    sharing = checkpoint("gemma3n", num_kv_shared_layers=1)
    with pytest.raises(UnsupportedModelError, match="--activations int8, .* as a whole") as caught:
        measure(sharing, None, text, **SIZE, activations="int8")
    assert "leave --activations out" in caught.value.hint


def test_declared_activations_that_are_not_applied_are_noted(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    """Measuring a W8A8 checkpoint with float inputs is noted in the report."""
    llmq.quantize(checkpoint("llama"), tmp_path / "out", method="rtn", bits=8, group_size="channel", device="cpu")
    folder = shutil.copytree(tmp_path / "out", tmp_path / "w8a8")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in settings["config_groups"].values():
        group["input_activations"] = {"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}
    builders.change_json(folder / "config.json", quantization_config=settings)
    [note] = measure(folder, None, text, **SIZE).notes
    assert note.startswith("the checkpoint declares quantized activations, which llmq does not apply")
    assert measure(folder, None, text, **SIZE, activations="int8").notes == ()
    assert measure(tmp_path / "out", None, text, **SIZE).notes == ()


@pytest.fixture(scope="module")
def w8a8(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer kind keeps its inputs in float."""
    out = tmp_path_factory.mktemp("w8a8") / "out"
    llmq.quantize(checkpoint("llama"), out, overrides=["down_proj:activations=none"], **W8A8)
    return out


@torch.no_grad()
def test_a_written_model_is_computed_as_it_declares(w8a8: Path, checkpoint: Checkpoints) -> None:
    """By `llmq eval`, by `llmq.load`, fused or not, and by transformers with llmq."""
    windows = builders.tokens(2, 24)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    model.load_state_dict(dict(llmq.dequantize(w8a8)), strict=False)
    weights_alone = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    round_inputs(model, lambda name: not name.endswith("down_proj"))
    expected = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    assert (weights_alone - expected).abs().max() > 1e-3
    assert (log_probabilities(w8a8, windows) - expected).abs().max() < 1e-4
    assert (log_probabilities(w8a8, windows, "none") - weights_alone).abs().max() < 1e-4
    llmq.enable_transformers()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(w8a8, dtype=torch.float32)
    finally:
        llmq.disable_transformers()
    for packed in (load_model(w8a8), load_model(w8a8, fuse=False), loaded):
        computed = packed(input_ids=windows, use_cache=False).logits.log_softmax(-1)
        assert (computed - expected).abs().mean() < 2e-4  # sums in another order round a few inputs differently


def test_saving_a_loaded_model_keeps_its_tensors(w8a8: Path, tmp_path: Path) -> None:
    load_model(w8a8).save_pretrained(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (w8a8, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (w8a8, tmp_path / "saved")]
    assert settings[0] == settings[1]


def test_a_conversion_keeps_quantized_inputs_or_is_refused(w8a8: Path, tmp_path: Path) -> None:
    llmq.convert(w8a8, tmp_path / "same", to="compressed-tensors")
    windows = builders.tokens(1, 16)
    assert torch.equal(log_probabilities(tmp_path / "same", windows), log_probabilities(w8a8, windows))
    for to in ("gptq", "gguf"):
        with pytest.raises(ConfigError, match="the model has quantized inputs, and") as caught:
            llmq.convert(w8a8, tmp_path / to, to=to)
        assert "compressed-tensors" in caught.value.hint and not (tmp_path / to).exists()


@pytest.mark.parametrize("format_", ["gptq", "gguf:q4_0", "compressed-tensors,mlx"])
def test_formats_without_quantized_inputs_are_refused(checkpoint: Checkpoints, tmp_path: Path, format_: str) -> None:
    request = ("quantize", checkpoint("llama"), tmp_path / "out", "--method", "rtn", "--activations", "int8")
    done = run_llmq(*request, "--group-size", "32", "--format", format_)
    refused(done, CONFIG, "quantized inputs", "give --format compressed-tensors")
    refused(run_llmq(*request, "--asymmetric"), CONFIG, "no engine multiplies inputs in int8 by weights with zero", "")
    refused(run_llmq(*request[:-2], "--format", "int-quantized"), CONFIG, "is for int8 inputs", "--activations int8")
    refused(run_llmq(*request, "--preset", "w8a8", "--bits", "4"), CONFIG, "for --bits 8, but --bits is 4", "--preset")


def test_a_run_sees_rounded_inputs(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    """With the same 4-bit grid, the quantized values differ, and the plan, report and engines name the inputs."""
    settings: dict[str, Any] = {
        "method": "fast", "group_size": 32, "calibration": text, "samples": 8, "seqlen": 32, "validate": 2,
        "device": "cpu",
    }  # fmt: skip
    llmq.quantize(checkpoint("llama"), tmp_path / "w4a16", **settings)
    report = llmq.quantize(checkpoint("llama"), tmp_path / "w4a8", preset="w4a8", **settings)
    one, other = (dict(llmq.dequantize(tmp_path / name)) for name in ("w4a16", "w4a8"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert any("int8 dynamic per token" in note for note in report.notes)
    assert report.verdict is not None and report.verdict.kl is not None
    assert "inputs int8 dynamic per token" in str(llmq.inspect(tmp_path / "w4a8").layers)
    group = json.loads((tmp_path / "w4a8" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert group["format"] == "pack-quantized"


def test_words_and_bytes_hold_the_same_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    windows, settings = builders.tokens(1, 16), {**W8A8, "preset": "w4a8", "group_size": 32}
    llmq.quantize(checkpoint("llama"), tmp_path / "words", **settings)
    llmq.convert(tmp_path / "words", tmp_path / "bytes", to="int-quantized")
    llmq.quantize(checkpoint("llama"), tmp_path / "both", format="int-quantized", **settings)
    expected = log_probabilities(tmp_path / "words", windows)
    assert all(torch.equal(log_probabilities(tmp_path / name, windows), expected) for name in ("bytes", "both"))
    assert "weight_packed" not in " ".join(load_file(tmp_path / "bytes" / "model.safetensors"))
    plain = llmq.quantize(checkpoint("llama"), tmp_path / "plain", method="rtn", group_size=32, device="cpu")
    with pytest.raises(ConfigError, match="is for int8 inputs"):
        llmq.convert(plain.output, tmp_path / "refused", to="int-quantized")


@torch.no_grad()
def test_fp8_inputs_are_computed_as_declared(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """By all that open the file, for weights in fp8 and in 4 bits; `eval --activations fp8` needs no declaration."""
    windows, settings = builders.tokens(2, 24), {"method": "rtn", "device": "cpu"}
    llmq.quantize(checkpoint("llama"), tmp_path / "fp8", preset="fp8", **settings)
    llmq.quantize(checkpoint("llama"), tmp_path / "alone", bits="fp8", **settings)
    expected = log_probabilities(tmp_path / "fp8", windows)
    assert torch.equal(log_probabilities(tmp_path / "alone", windows, "fp8"), expected)
    assert (log_probabilities(tmp_path / "alone", windows) - expected).abs().mean() > 1e-3
    llmq.enable_transformers()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    finally:
        llmq.disable_transformers()
    for model in (load_model(tmp_path / "fp8"), loaded):
        computed = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
        assert (computed - expected).abs().mean() < 2e-4
    x = torch.randn(2, loaded.config.hidden_size)
    for model in (load_model(tmp_path / "fp8"), loaded):
        linear = model.get_submodule("model.layers.0.mlp.up_proj")
        assert torch.equal(linear(x), linear(input=x))
    assert "float-quantized, inputs fp8 dynamic per token" in str(llmq.inspect(tmp_path / "fp8").layers)


@pytest.mark.parametrize("preset", ["w8a8", "fp8"])
@torch.no_grad()
def test_experts_have_quantized_inputs(preset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    windows = builders.tokens(2, 16)
    model = builders.save_model(tmp_path / "mixtral", builders.causal_model(mixtures.mixtral()))
    llmq.quantize(model, tmp_path / "out", **{**W8A8, "preset": preset})
    computed = load_model(tmp_path / "out")(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    assert (computed - log_probabilities(tmp_path / "out", windows)).abs().mean() < 2e-4
    assert (computed - log_probabilities(tmp_path / "out", windows, "none")).abs().mean() > 2e-4
    assert "float inputs" not in caplog.text


@torch.no_grad()
def test_experts_with_inputs_in_nvfp4_share_a_global_scale(text: Path, tmp_path: Path) -> None:
    windows = builders.tokens(2, 16)
    model = builders.save_model(tmp_path / "mixtral", builders.causal_model(mixtures.mixtral()))
    given: dict[str, Any] = {"preset": "nvfp4", "method": "gptq", "samples": 8, "seqlen": 32, "validate": 0}
    llmq.quantize(model, tmp_path / "out", calibration=text, device="cpu", **given)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: float(t) for name, t in tensors.items() if name.endswith("input_global_scale")}
    for parts in (("w1", "w3"), ("w2",)):
        own = {s for name, s in scales.items() if "layers.1." in name and name.split(".")[-2] in parts}
        assert len(own) == 1, own
    assert len([name for name in scales if ".w2." in name]) == len([name for name in tensors if ".w2.weight_p" in name])
    evaluated = log_probabilities(tmp_path / "out", windows)
    computed = load_model(tmp_path / "out")(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    assert (computed - evaluated).abs().mean() < 1e-3
    assert (computed - log_probabilities(tmp_path / "out", windows, "none")).abs().mean() > 5e-3

    def stop(event: object) -> None:
        if isinstance(event, BlockReport):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(model, tmp_path / "again", calibration=text, device="cpu", on_event=stop, **given)
    llmq.quantize(model, tmp_path / "again", calibration=text, device="cpu", **given)
    again, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "out"))
    assert again == whole


STATIC: dict[str, Any] = {
    "preset": "w8a8", "activations": "int8:static", "method": "gptq", "samples": 8, "seqlen": 32, "validate": 0,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def static(checkpoint: Checkpoints, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    llmq.quantize(checkpoint("llama"), out, calibration=text, **STATIC)
    return out


@torch.no_grad()
def test_static_scales_are_written_and_applied(static: Path) -> None:
    tensors, windows = load_file(static / "model.safetensors"), builders.tokens(2, 24)
    scales = {name.removesuffix(".input_scale"): t for name, t in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == sum(name.endswith("weight_scale") for name in tensors)
    assert all(scale.shape == (1,) and scale > 0 for scale in scales.values())
    for first, second in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):  # one input
        assert scales[f"model.layers.1.{first}"] == scales[f"model.layers.1.{second}"]
    computed = load_model(static)(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    evaluated, weights_alone = (log_probabilities(static, windows, kind) for kind in ("file", "none"))
    assert (computed - evaluated).abs().mean() < 5e-4 < (evaluated - weights_alone).abs().mean()


def test_a_continued_run_with_static_scales_has_the_same_bytes(
    static: Path, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stop(event: object) -> None:
        if isinstance(event, BlockReport):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(checkpoint("llama"), out, calibration=text, on_event=stop, **STATIC)
    llmq.quantize(checkpoint("llama"), out, calibration=text, **STATIC)
    assert (out / "model.safetensors").read_bytes() == (static / "model.safetensors").read_bytes()


@pytest.mark.parametrize("activations", ["int8:static", "int8"])
def test_smoothing_lowers_the_error_of_outliers(
    activations: str, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    """The model has norms with a few large channels; smoothing divides them, and leaves the float model unchanged."""
    settings = QuantConfig(calibration={"sources": [str(text)], "samples": 8, "seqlen": 32, "validation": 0}).replace(
        scheme=WeightScheme(8, "channel"), activations=activations, method="gptq"
    )
    losses = {}
    for name, stages in (("plain", METHODS["gptq"]), ("smooth", settings.stages)):
        Job(checkpoint("llama"), tmp_path / name, settings, stages=stages, device="cpu").run()
        losses[name] = measure(tmp_path / name, checkpoint("llama"), text, **SIZE).model.kl_mean
    assert losses["smooth"] is not None and losses["plain"] is not None
    assert losses["smooth"] < 0.8 * losses["plain"]


def test_what_static_scales_cannot_do_is_refused(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    request = ("quantize", checkpoint("llama"), tmp_path / "out", "--activations", "int8:static")
    refused(run_llmq(*request, "--method", "rtn"), CONFIG, "the method rtn reads none", "--activations int8")
    model = builders.save_model(tmp_path / "mixtral", builders.causal_model(mixtures.mixtral()))
    with pytest.raises(ConfigError, match="expected scales that are not measured on text") as caught:
        Job(model, tmp_path / "out", QuantConfig(activations="int8:static"), device="cpu")
    assert "*experts*:activations=int8" in caught.value.hint
    dynamic = Override(pattern="*experts*", activations="int8")
    Job(model, tmp_path / "out", QuantConfig(activations="int8:static", overrides=[dynamic]), device="cpu")
