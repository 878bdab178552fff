"""`--quantize-head`: the layer that makes logits is packed like any other, and is tied to nothing from then on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.errors import CheckpointError, ConfigError
from llmq.evaluation.measure import measure
from llmq.export.convert import Converter
from llmq.job import FLOAT_HEAD
from llmq.runtime.packed_linear import PackedLinear
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


def test_what_the_head_is_fed_decides_how_it_is_rounded(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    model = checkpoint("llama", tie_word_embeddings=True)
    for method in ("rtn", "gptq"):
        quantize(model, tmp_path / method, text, method=method, quantize_head=True)
    with_text, plain = (dict(llmq.dequantize(tmp_path / name))[f"{HEAD}.weight"] for name in ("gptq", "rtn"))
    float_head = _float_head(model)
    fed = _head_inputs(tmp_path / "gptq", windows_of(model, text))
    errors = [float(((rounded - float_head) @ fed.T).norm()) for rounded in (with_text, plain)]
    assert errors[0] < 0.95 * errors[1]


def _head_inputs(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """(T, D), as the quantized blocks make it."""
    loaded, _ = llmq.load(folder, device="cpu")
    found: list[torch.Tensor] = []
    loaded.lm_head.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    logits(loaded, windows)
    return torch.cat(found)


def test_the_result_is_measured_block_by_block(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama", tie_word_embeddings=True), tmp_path / "out"
    quantize(model, out, text, method="rtn", quantize_head=True, format="gptq")
    found = measure(out, model, str(text), seqlen=16, limit=1, device="cpu")
    loaded, _ = llmq.load(out, device="cpu")
    assert found and torch.isfinite(logits(loaded, builders.tokens(1, 8))).all()


def test_a_run_that_was_stopped_at_the_head_goes_on_to_the_same_bytes(
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
def test_that_the_tuning_does_not_see_its_rounding_is_said(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, quantize_head: bool
) -> None:
    model = checkpoint("llama")
    tuned = job(model, tmp_path / "out", text, method="balanced", quantize_head=quantize_head)
    assert (FLOAT_HEAD in tuned.report.notes) == quantize_head
    plain = job(model, tmp_path / "out", text, method="gptq", quantize_head=quantize_head)
    assert FLOAT_HEAD not in plain.report.notes


@pytest.mark.parametrize(
    ("format_", "words"),
    [("awq", "awq cannot hold a quantized head"), ("gguf:q4_k_m", "chooses a block type for the head itself")],
)
def test_formats_that_cannot_hold_it_refuse(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, format_: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize(checkpoint("llama"), tmp_path / "out", text, method="rtn", format=format_, quantize_head=True)


def test_a_conversion_refuses_it_as_a_run_does(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    quantize(checkpoint("llama"), tmp_path / "out", text, method="rtn", format="gptq", quantize_head=True)
    with pytest.raises(ConfigError, match="awq cannot hold the quantized head lm_head"):
        Converter(tmp_path / "out", tmp_path / "awq", "awq")


def test_a_packed_head_that_the_configuration_ties_is_refused(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(checkpoint("llama", tie_word_embeddings=True), out, text, method="rtn", format="gptq", quantize_head=True)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="is packed, but config.json ties it") as refused:
        llmq.load(out, device="cpu")
    assert "tie_word_embeddings to false" in refused.value.hint
