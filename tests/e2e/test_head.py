"""`--quantize-head`: the output head is packed like any other layer, and is no longer tied to the embedding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.errors import ConfigError
from llmq.evaluation.measure import measure
from llmq.export.convert import Converter
from llmq.runtime.packed_linear import PackedLinear
from llmq.steps.lm_head import FLOAT_HEAD
from tests import builders
from tests.runs import (
    float_equivalent,
    float_model,
    job,
    logits,
    quantize,
    relative,
    stop_in_block,
    tensors_of,
    windows_of,
)

Checkpoints = Callable[..., Path]
HEAD = "lm_head"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("method", "format_"), [("rtn", "gptq"), ("gptq", "gptq"), ("gptq", "compressed-tensors")])
def test_the_head_is_packed_and_runs(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, method: str, format_: str, tied: bool
) -> None:
    model, out = checkpoint("llama", tie_word_embeddings=tied), tmp_path / "out"
    report = quantize(model, out, text, method=method, format=format_, quantize_head=True)
    head = report.blocks[-1]
    assert [layer.name for layer in head.layers] == [HEAD] and HEAD not in report.left
    stored, config = tensors_of(out), json.loads((out / "config.json").read_text())
    assert f"{HEAD}.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], tensors_of(model)["model.embed_tokens.weight"])
    assert config["tie_word_embeddings"] is False
    loaded, _ = llmq.load(out, device="cpu")
    assert isinstance(loaded.lm_head, PackedLinear)
    weights, ids = float_equivalent(out, model), builders.tokens(2, 16)
    twin = float_model(model, {name: weight for name, weight in weights.items() if name != f"{HEAD}.weight"})
    twin.lm_head.weight = torch.nn.Parameter(weights[f"{HEAD}.weight"])
    assert relative(logits(loaded, ids), logits(twin, ids)) < 1e-5
    assert relative(weights[f"{HEAD}.weight"], _float_head(model)) > 1e-3


def _float_head(model: Path) -> torch.Tensor:
    tensors = tensors_of(model)
    return tensors.get(f"{HEAD}.weight", tensors["model.embed_tokens.weight"])


def test_gptq_uses_the_inputs_of_the_head(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    model = checkpoint("llama", tie_word_embeddings=True)
    for method in ("rtn", "gptq"):
        quantize(model, tmp_path / method, text, method=method, quantize_head=True)
    with_text, plain = (dict(llmq.dequantize(tmp_path / name))[f"{HEAD}.weight"] for name in ("gptq", "rtn"))
    float_head = _float_head(model)
    fed = _head_inputs(tmp_path / "gptq", windows_of(model, text))
    errors = [float(((rounded - float_head) @ fed.T).norm()) for rounded in (with_text, plain)]
    assert errors[0] < 0.95 * errors[1]


def _head_inputs(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Inputs of the head (T, D), computed by the quantized blocks."""
    loaded, _ = llmq.load(folder, device="cpu")
    inputs: list[torch.Tensor] = []
    loaded.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    logits(loaded, windows)
    return torch.cat(inputs)


def test_a_model_with_a_packed_head_is_evaluated_by_blocks(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama", tie_word_embeddings=True), tmp_path / "out"
    quantize(model, out, text, method="rtn", quantize_head=True, format="gptq")
    evaluation = measure(out, model, str(text), seqlen=16, limit=1, device="cpu")
    loaded, _ = llmq.load(out, device="cpu")
    assert evaluation and torch.isfinite(logits(loaded, builders.tokens(1, 8))).all()


def test_a_run_interrupted_at_the_head_ends_in_the_same_bytes(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    model, settings = checkpoint("llama"), {"method": "gptq", "quantize_head": True}
    quantize(model, tmp_path / "whole", text, **settings)
    stopped = job(model, tmp_path / "out", text, **settings)
    stop_in_block(stopped, stopped.blocks)
    assert stopped.commits == stopped.blocks + 1
    report = quantize(model, tmp_path / "out", text, **settings)
    assert f"continued: {stopped.blocks} of {stopped.commits} blocks were finished earlier" in report.notes
    assert [block.resumed for block in report.blocks] == [True] * stopped.blocks + [False]
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == out.keys() and all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.parametrize("quantize_head", [True, False])
def test_the_report_notes_that_tuning_uses_a_float_head(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, quantize_head: bool
) -> None:
    model = checkpoint("llama")
    tuned = job(model, tmp_path / "out", text, method="best", quantize_head=quantize_head)
    assert (FLOAT_HEAD in tuned.report.notes) == quantize_head
    plain = job(model, tmp_path / "out", text, method="gptq", quantize_head=quantize_head)
    assert FLOAT_HEAD not in plain.report.notes


@pytest.mark.parametrize(
    ("format_", "words"),
    [("awq", "awq cannot hold a quantized head"), ("gguf:q4_k_m", "chooses a block type for the head itself")],
)
def test_formats_that_cannot_hold_a_packed_head_are_refused(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, format_: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize(checkpoint("llama"), tmp_path / "out", text, method="rtn", format=format_, quantize_head=True)


def test_a_conversion_that_cannot_hold_a_packed_head_is_refused(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    quantize(checkpoint("llama"), tmp_path / "out", text, method="rtn", format="gptq", quantize_head=True)
    with pytest.raises(ConfigError, match="awq cannot hold the quantized head lm_head"):
        Converter(tmp_path / "out", tmp_path / "awq", "awq")


def test_a_packed_head_is_used_although_config_json_ties_it(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(checkpoint("llama", tie_word_embeddings=True), out, text, method="rtn", format="gptq", quantize_head=True)
    expected = logits(llmq.load(out, device="cpu")[0], builders.tokens(1, 8))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(logits(llmq.load(out, device="cpu")[0], builders.tokens(1, 8)), expected)
