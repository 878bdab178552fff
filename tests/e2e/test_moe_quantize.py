"""Mixtures of experts from float to a packed file and back: every family, and the report on experts."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError
from llmq.methods import METHODS
from llmq.model.experts.separate import SeparateExperts
from llmq.numerics.scheme import WeightScheme
from llmq.report.expert_tokens import summary
from llmq.runtime.open_skeleton import open_skeleton
from llmq.runtime.packed_experts import PackedExperts
from tests import builders, command_line, mixtures, runs
from tests.runs import quantize, tensors_of

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("mixtral")`: a tiny mixture on disk, created once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model = builders.causal_model(mixtures.CONFIGS[name]())
            made[name] = builders.save_model(tmp_path_factory.mktemp(name), model)
        return made[name]

    return make


def eager(folder: Path) -> Any:
    """The model of transformers with its eager implementation of experts."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def streamed_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the checkpoint, run block by block with separate experts."""
    skeleton = open_skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    assert any(isinstance(module, SeparateExperts) for module in skeleton.model.modules())
    return runs.streamed_logits(skeleton, tokens)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(tokens, use_cache=False).logits
    return output


@pytest.mark.parametrize("name", mixtures.CONFIGS)
def test_separate_experts_equal_stacked_experts(saved: Saved, name: str) -> None:
    tokens = builders.tokens(2, 12)
    expected = logits(eager(saved(name)), tokens)
    separate = streamed_logits(saved(name), tokens)
    torch.testing.assert_close(separate, expected, rtol=0, atol=1e-5 * float(expected.std()))


@dataclass(frozen=True)
class OnDisk:
    """How a family stores stacked experts, below `model.layers.i.`"""

    experts: str  # prefix of packed experts
    first: str
    second: str
    transposed: bool
    taking_turns: bool  # gate and up rows are interleaved

    def tensors(self, weights: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The stacked tensors of a layer, built from those of the separate experts."""
        stacked = {}
        for name, parts in ((self.first, ("gate_proj", "up_proj")), (self.second, ("down_proj",))):
            for kind in ("weight", "bias"):
                numbered = [f"{layer}.{self.experts}.{e}" for e in range(mixtures.EXPERTS)]
                if f"{numbered[0]}.down_proj.{kind}" in weights:
                    expert_parts = [[weights[f"{expert}.{part}.{kind}"] for part in parts] for expert in numbered]
                    joined = [
                        torch.stack(p, 1).flatten(0, 1) if self.taking_turns else torch.cat(p) for p in expert_parts
                    ]
                    whole = torch.stack(joined)
                    turned = whole.mT.contiguous() if self.transposed and kind == "weight" else whole
                    stacked[f"{layer}.{name}" + ("_bias" if kind == "bias" else "")] = turned
        return stacked


STACKED = {
    "granitemoe": OnDisk(
        "block_sparse_moe.experts", "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight",
        transposed=False, taking_turns=False,
    ),
    "gpt_oss": OnDisk(
        "mlp.experts", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True, taking_turns=True
    ),
    "llama4": OnDisk(
        "feed_forward.experts", "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj",
        transposed=True, taking_turns=False,
    ),
}  # fmt: skip


def twin(name: str, out: Path, model: Path, folder: Path) -> Path:
    """A float checkpoint of the dequantized weights in `out`, named and stacked as in `model`."""
    weights = {**tensors_of(out), **dict(llmq.dequantize(out))}
    if name in STACKED:
        for layer in range(mixtures.SIZES["num_hidden_layers"]):
            weights |= STACKED[name].tensors(weights, f"model.layers.{layer}")
    builders.save_model(folder, AutoModelForCausalLM.from_pretrained(model))
    floats = {stored: weights[stored] for stored in tensors_of(model)}
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ROUND_TRIPS = ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h"]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_written_model_runs(saved: Saved, tmp_path: Path, text: Path, name: str) -> None:
    """Loaded packed, run block by block, and as a float twin in transformers: equal logits."""
    model, out = saved(name), tmp_path / "out"
    report = quantize(model, out, text, method="rtn")
    assert not [layer for layer in report.left if ".experts." in layer]
    loaded, _ = llmq.load(out, device="cpu")
    packed = [module for module in loaded.modules() if isinstance(module, PackedExperts)]
    codes = {where: weight for module in packed for where, weight in module.quantized()}
    assert {layer.name for layer in report.layers if ".experts." in layer.name} == set(codes)
    assert not [tensor for tensor in tensors_of(out).values() if tensor.dim() == 3 and tensor.shape[1] > 1]
    tokens = builders.tokens(2, 12)
    output = logits(loaded, tokens)
    close = {"rtol": 0, "atol": 1e-4 * float(output.std())}
    torch.testing.assert_close(streamed_logits(out, tokens), output, **close)
    torch.testing.assert_close(logits(eager(twin(name, out, model, tmp_path / "twin")), tokens), output, **close)


@pytest.mark.parametrize(("name", "bits"), [("mixtral", 2), ("gpt_oss", 3), ("llama4", 8)])
def test_other_bits(saved: Saved, tmp_path: Path, text: Path, name: str, bits: int) -> None:
    quantize(saved(name), tmp_path / "out", text, method="rtn", bits=bits)
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    tokens = builders.tokens(2, 12)
    expected = streamed_logits(tmp_path / "out", tokens)
    torch.testing.assert_close(logits(loaded, tokens), expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_skipped_experts_are_stored_unchanged(saved: Saved, tmp_path: Path, text: Path, name: str) -> None:
    """If one projection is skipped, all experts of the layer are, because engines run them together."""
    down = "w2" if name == "mixtral" else "down_proj"
    report = quantize(saved(name), tmp_path / "out", text, method="rtn", skip=[f"*experts.*.{down}"])
    reasons = {reason for layer, reason in report.left.items() if ".experts." in layer and not layer.endswith(down)}
    assert len(reasons) == 2 and all("share a grid" in reason and "skipped on request" in reason for reason in reasons)
    before, after = tensors_of(saved(name)), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[stored], tensor) for stored, tensor in before.items() if "experts" in stored)
    tokens = builders.tokens(2, 12)
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    expected = streamed_logits(tmp_path / "out", tokens)
    torch.testing.assert_close(logits(loaded, tokens), expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_the_experts_of_a_layer_share_a_grid(saved: Saved, tmp_path: Path, text: Path) -> None:
    overrides = ["layers.0*experts.1.w2:bits=8", "layers.1*.w3:group_size=32"]
    job = runs.job(saved("mixtral"), tmp_path / "out", text, method="rtn", overrides=overrides)
    schemes = {
        (path.split(".")[2], plan.scheme.weights) for path, plan in job.plan.layers.items() if ".experts." in path
    }
    assert schemes == {
        ("0", WeightScheme(8, 16)),
        ("1", WeightScheme(4, 16)),
    }  # 32 does not divide the 48 inputs of down
    reasons = {plan.reason for path, plan in job.plan.layers.items() if "experts" in path and plan.reason}
    assert len(reasons) == 2 and all("the experts of a layer share a grid" in reason for reason in reasons)
    strict = {"method": "rtn", "overrides": overrides, "strict": True}
    with pytest.raises(ConfigError, match="share a grid"):
        runs.job(saved("mixtral"), tmp_path / "out", text, **strict)


def test_an_expert_without_tokens_uses_other_tokens(tmp_path: Path, text: Path) -> None:
    """The expert is quantized with other tokens of its layer, which is better than rounding to nearest."""
    config = mixtures.glm4_moe()
    model = builders.causal_model(config)
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1e4  # affects only the choice of experts
    folder = builders.save_model(tmp_path / "model", model)
    report = quantize(folder, tmp_path / "out", text, method="gptq")
    layers = {layer.name: layer for layer in report.layers}
    unreached = [layer for name, layer in layers.items() if ".experts.3." in name]
    assert len(unreached) == 3 and all(layer.tokens == 0 and layer.borrowed >= 2 * 32 for layer in unreached)
    nearest = quantize(folder, tmp_path / "rtn", text, method="rtn")
    blind = {layer.name: layer.weight_error for layer in nearest.layers}
    assert all(layer.weight_error > 1.02 * blind[layer.name] for layer in unreached)  # for a smaller output error
    assert all("fitted to other tokens of the layer" in layer.notes[-1] for layer in unreached)
    assert str(summary(report.experts)).startswith("each saw at least 0 tokens")
    assert all(math.isfinite(layer.output_error or 0) for layer in unreached)
    llmq.load(tmp_path / "out", device="cpu")


def test_target_bits_assigns_one_grid_per_layer_of_experts(saved: Saved, tmp_path: Path, text: Path) -> None:
    report = quantize(saved("mixtral"), tmp_path / "out", text, method="rtn", target_bits=6.5, group_size=16)
    assert report.bits_per_weight <= 6.5
    by_layer: dict[str, set[str]] = {}
    for layer in report.layers:
        if ".experts." in layer.name:
            by_layer.setdefault(layer.name.split(".")[2], set()).add(layer.scheme)
    assert all(len(schemes) == 1 for schemes in by_layer.values())
    assert len(report.settings["overrides"]) < 12  # one pattern per layer of experts, not one per expert
    llmq.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize(("name", "method"), [("mixtral", "fast"), ("gpt_oss", "best"), ("llama4", "awq")])
def test_an_interrupted_run_ends_in_the_same_bytes(
    saved: Saved, tmp_path: Path, text: Path, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that use more than one weight also handle separate experts."""
    stages = METHODS[method]
    if stages.tuning is not None and stages.block_tuning is not None:
        short = {"steps": 2, "tokens": 96}
        stages = replace(
            stages, block_tuning=replace(stages.block_tuning, **short), tuning=replace(stages.tuning, **short)
        )
    runs.job(saved(name), tmp_path / "whole", text, stages=stages).run()
    runs.stop_in_block(runs.job(saved(name), tmp_path / "out", text, stages=stages), 1)
    continued = runs.job(saved(name), tmp_path / "out", text, stages=stages).run()
    assert [block.resumed for block in continued.blocks] == [True, False]
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_command_line_summarizes_all_experts(saved: Saved, tmp_path: Path, text: Path) -> None:
    arguments = ("quantize", saved("mixtral"), tmp_path / "out", "--method", "gptq", "--calibration", text)
    arguments += ("--samples", "4", "--seqlen", "48", "--group-size", "16")
    planned = command_line.llmq(*arguments, "--dry-run").stdout
    assert planned.count(".experts.*.w1") == 1 and ".experts.1.w1" not in planned
    done = command_line.llmq(*arguments)
    assert done.exit_code == 0 and " experts " in done.stdout and "saw at least" in done.stdout
    assert "calibration tokens per expert" in done.stdout
    recorded = json.loads((tmp_path / "out" / "llmq.json").read_text(encoding="utf-8"))["experts"]
    assert [layer["experts"] for layer in recorded] == [mixtures.EXPERTS] * mixtures.SIZES["num_hidden_layers"]
    notes = [line for line in done.stderr.splitlines() if "experts." in line and "block" not in line.split()[:1]]
    assert len(notes) < mixtures.EXPERTS


def test_experts_in_an_unknown_form_are_listed(tmp_path: Path) -> None:
    config = transformers.JetMoeConfig(**mixtures.sizes(num_local_experts=4, kv_channels=8))
    folder = builders.save_model(tmp_path / "model", builders.causal_model(config))
    report = llmq.quantize(folder, tmp_path / "out", method="rtn", group_size=16, device="cpu")
    assert report.left["model.layers.0.mlp.input_linear"] == "not a linear layer"
