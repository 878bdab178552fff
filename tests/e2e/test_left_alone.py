"""Layers kept in float are copied byte for byte and reported with a reason: heads for multi-token prediction, routers,
weights that the model's code uses directly, vision encoders. Also float weights that are stored transposed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llmq
from llmq import formats
from llmq.errors import UnsupportedModelError
from llmq.methods import Method, Tuning
from llmq.model.analyse import meta_run
from llmq.model.build import skeleton
from llmq.steps import left_in_float
from tests import builders
from tests.architectures import examine, tiny
from tests.runs import float_equivalent, float_model, job, logits, quantize, relative, stop_in_block, tensors_of

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize("format_", ["compressed-tensors", "gptq"])
def test_multi_token_prediction_heads_are_copied(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, format_: str
) -> None:
    """DeepSeek-V3 and GLM-4.5 store one more layer in the file, which the model of transformers does not have."""
    model, out = shutil.copytree(checkpoint("llama"), tmp_path / "model"), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    blocks = len({name.split(".")[2] for name in tensors if ".layers." in name})
    generator = torch.Generator().manual_seed(7)
    extra = {
        name.replace(".0.", f".{blocks}."): torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if ".layers.0." in name
    }
    extra[f"model.layers.{blocks}.eh_proj.weight"] = torch.randn(32, 64, generator=generator)
    save_file({**tensors, **extra}, model / "model.safetensors", {"format": "pt"})
    report = quantize(model, out, text, method="gptq", format=format_)
    written = tensors_of(out)
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    matrices = {name.removesuffix(".weight") for name, tensor in extra.items() if tensor.dim() == 2}
    unused = {name for name, reason in report.left.items() if reason == left_in_float.DRAFTS}
    assert unused == {name.removesuffix(".weight") for name in extra}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    reader = formats.detect(config).read_config(config)
    assert not any(reader(name) for name in matrices) and reader("model.layers.0.mlp.up_proj")
    loaded, _ = llmq.load(out, device="cpu")
    assert torch.isfinite(logits(loaded, builders.tokens(1, 8))).all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_transposed_weights_are_written_transposed(text: Path, tmp_path: Path, method: str) -> None:
    """c_proj of the attention is square: a wrongly transposed weight would have the right shape."""
    outcome = examine(tiny("gpt2"), tmp_path, text, method=method, skip=["attn.c_proj", "mlp.c_fc"])
    assert max(outcome.difference, outcome.streamed or 0) < 1e-4 < outcome.noticed
    assert all(name.endswith(("attn.c_attn", "mlp.c_proj")) for name in outcome.packed)
    if method == "gptq":
        assert not outcome.altered


def test_transposed_weights_are_tuned(text: Path, tmp_path: Path) -> None:
    tuning = Tuning(steps=2, scales=3e-3, rounding=5e-2, tokens=64)
    method = Method(rounding="gptq", validation=0.25, tuning=tuning)
    outcome = examine(tiny("gpt2"), tmp_path, text, stages=method, skip=["attn.c_proj"])
    assert outcome.difference < 1e-4 < outcome.noticed and not outcome.altered


def test_an_interrupted_run_of_transposed_weights_is_continued(text: Path, tmp_path: Path) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(tiny("gpt2")))
    settings = {"method": "gptq", "skip": ["attn.c_proj"]}
    quantize(model, tmp_path / "whole", text, **settings)
    stop_in_block(job(model, tmp_path / "out", text, **settings), 1)
    assert quantize(model, tmp_path / "out", text, **settings).blocks[0].resumed
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == out.keys() and all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.parametrize(
    ("model_type", "ending", "reason"),
    [
        ("mamba", "mixer.dt_proj", meta_run.USED_ELSEWHERE),
        ("jamba", "mamba.dt_proj", meta_run.USED_ELSEWHERE),
        ("mixtral", "block_sparse_moe.gate", meta_run.ROUTER),
        ("deepseek_v3", "mlp.gate", meta_run.ROUTER),
        ("afmoe", "router.gate", meta_run.ROUTER),
        ("jetmoe", "mlp.router.layer", meta_run.ROUTER),
        ("qwen2_moe", "mlp.gate", meta_run.ROUTER),
        ("qwen2_moe", "mlp.shared_expert_gate", "a gate: it has 1 output"),
        ("gemma3n_text", "altup.modality_router", "a gate: it has 4 outputs"),
    ],
)
def test_every_kept_layer_has_a_reason(text: Path, tmp_path: Path, model_type: str, ending: str, reason: str) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(tiny(model_type)))
    left = job(model, tmp_path / "out", text, method="rtn").plan.left()
    reasons = {why for name, why in left.items() if name.endswith(ending)}
    assert reasons == {reason}


def test_a_vision_encoder_is_ignored_by_name(text: Path, tmp_path: Path) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(tiny("qwen2_vl")))
    ignored = job(model, tmp_path / "out", text, method="rtn").plan.quantization_config()["ignore"]
    stored = {name.removesuffix(".weight") for name, tensor in tensors_of(model).items() if tensor.dim() == 2}
    pictures = {name for name in stored if name.startswith("visual.")}
    assert pictures and pictures <= set(ignored)
    assert not any(name in ignored for name in stored if ".layers." in name)


class Model(nn.Module):
    """Four layers: a plain one, one whose weight is used directly, one that is ranked, one with few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.plain, self.direct, self.ranked = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.gate = nn.Linear(16, 1)
        self.router_weight = nn.Parameter(torch.empty(16, 16))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.plain(self.embed(input_ids))
        if (x > 0).any():  # depends on values, which meta tensors do not have
            raise ValueError
        assert self.plain.weight.dtype == x.dtype  # does not depend on values
        x = x @ self.direct.weight.T
        scores = self.ranked(x).softmax(-1).to(torch.float32)
        nn.functional.linear(x, self.router_weight).sigmoid().topk(2)
        return x * scores.topk(2).values.sum(-1, keepdim=True) * self.gate(x)


def test_special_layers_are_detected_on_meta() -> None:
    model = Model().to("meta")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert meta_run.special_layers(model, linears) == {
        "direct": meta_run.USED_ELSEWHERE,
        "ranked": meta_run.ROUTER,
        "router_weight": meta_run.ROUTER,
        "gate": "a gate: it has 1 output",
    }
    assert not meta_run.run(model)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_blocks_that_share_keys_are_quantized_without_text(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    """These blocks cannot be run one by one, which rtn does not need; the result runs as a whole."""
    model, out = checkpoint("gemma3n", num_hidden_layers=4, num_kv_shared_layers=2), tmp_path / "out"
    report = quantize(model, out, text, method="rtn")
    assert report.blocks and all(block.layers for block in report.blocks)
    twin = float_model(model, float_equivalent(out, model))
    loaded, _ = llmq.load(out, device="cpu")
    ids = builders.tokens(1, 8)
    assert relative(logits(loaded, ids), logits(twin, ids)) < 1e-4
    with pytest.raises(UnsupportedModelError, match="share the keys and values"):
        quantize(model, tmp_path / "other", text, method="gptq")


def test_a_layer_of_several_tensors_is_read_and_copied(text: Path, tmp_path: Path) -> None:
    """A convolution over q, k and v is stored as three tensors; transforms read it and do not change it."""
    outcome = examine(tiny("olmo_hybrid"), tmp_path, text, method="awq")
    assert max(outcome.difference, outcome.streamed or 0) < 1e-4 < outcome.noticed
    assert not any("conv1d" in name for name in outcome.altered)


def test_a_block_used_in_two_places_is_kept_in_float(text: Path, tmp_path: Path) -> None:
    """Zamba runs one shared transformer in several blocks: quantizing it in one block would change the others."""
    outcome = examine(tiny("zamba"), tmp_path, text)
    shared = {name for name, reason in outcome.left.items() if reason == skeleton.SHARED}
    assert shared and not outcome.altered and not any("shared_transf" in name for name in outcome.packed)
