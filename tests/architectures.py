"""Toy models with random weights of transformers' classes, and the result of quantizing each.

`tests/e2e/test_architectures.py` checks a sample; `python eval/architectures.py` runs all of them, and its result file
is the table in docs/MODELS.md.
"""

import re
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.report.events import Event, Planned
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders
from tests.runs import float_equivalent, logits, relative, streamed_logits, tensors_of
from tests.toy_configs import entry, toy_config

# What the tests run: each kind of model, and one for each fault that was mended. `eval/architectures.py` runs all.
ARCHITECTURES = (
    "bloom", "codegen", "cohere", "falcon", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "gpt2",
    "gpt_neox", "gptj", "llama", "minicpm3", "modernbert-decoder", "mpt", "opt", "phi", "phi3", "qwen3", "stablelm",
    "xlnet", "bamba", "falcon_h1", "falcon_mamba", "lfm2", "mamba2", "olmo_hybrid", "qwen3_5_text", "recurrent_gemma",
    "rwkv", "zamba", "aria_text", "deepseek_v3", "deepseek_v4", "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba",
    "jetmoe", "llama4_text", "mixtral", "nemotron_h", "phimoe", "qwen2_moe", "qwen3_next", "gemma3", "glm4v",
    "idefics3", "llava", "qwen2_vl", "qwen3_vl_moe", "sarvam_moe",
)  # fmt: skip

SETTINGS: dict[str, Any] = {"method": "gptq", "group_size": 16, "scales": "minmax", "samples": 8, "seqlen": 16}
ROUTERS = re.compile(r"\.(gate|router|wg|shared_expert_gate|modality_router|gate\.linear|router\.\w+)$")


@dataclass(frozen=True)
class Outcome:
    """The result of quantizing one architecture.

    packed     names of the packed modules
    left       module kept in float -> reason, as reported
    unlisted   matrices of the checkpoint that are neither packed nor listed in `left`
    altered    tensors that are not packed, but differ from those of the checkpoint
    difference ‖f̂ - f‖ / ‖f‖ between the logits of the loaded model and of the float model with the same weights
    noticed    the same difference after one weight of the float model was changed
    replayed   the difference between running the float model block by block and as a whole; None if unsupported
    streamed   the same difference for the quantized model
    estimated  whether the time of the run was estimated; without that, its progress is in blocks
    """

    model_class: str
    blocks: int
    packed: tuple[str, ...]
    left: dict[str, str]
    unlisted: tuple[str, ...]
    altered: tuple[str, ...]
    finite: bool
    difference: float
    noticed: float
    replayed: float | None
    streamed: float | None
    notes: tuple[str, ...]
    estimated: bool

    @property
    def routers(self) -> list[str]:
        """Packed routers and gates, which no engine expects to be packed."""
        return [name for name in self.packed if ROUTERS.search(name)]


def tiny(model_type: str) -> Any:
    """The configuration of a toy model of this type."""
    return toy_config(entry(model_type))


def examine(config: Any, folder: Path, text: Path, **settings: Any) -> Outcome:
    """Quantize, save, load and run a toy model of this configuration; `folder` is empty before and afterwards.

    `settings` are those of `llmq.quantize`, on top of SETTINGS.
    """
    model, out, twin = folder / "model", folder / "out", folder / "twin"
    ids = builders.tokens(2, 16)
    original = builders.causal_model(config)
    builders.save_model(model, original)
    events: list[Event] = []
    settings = {**SETTINGS, **settings, "on_event": events.append}
    report = llmq.quantize(str(model), out, device="cpu", calibration=[text], **settings)
    with warnings.catch_warnings():
        loaded, _ = llmq.load(out, device="cpu")
    logits_loaded = logits(loaded, ids)
    weights = {**tensors_of(out), **float_equivalent(out, model)}
    transposed = {f"{path}.weight" for path, module in original.named_modules() if isinstance(module, Conv1D)}
    for name in transposed - tensors_of(out).keys():
        weights[name] = weights[name].T.contiguous()
    floats = _twin(model, twin, type(original), weights)
    expected = logits(floats, ids)
    packed = [layer.name for block in report.blocks for layer in block.layers]
    _change(floats, weights[f"{packed[0]}.weight"])
    other = logits(floats, ids)
    before, after = tensors_of(model), tensors_of(out)
    replaced = {f"{name}.weight" for name in packed} | (before.keys() - weights.keys())  # separate tensors, or stacked
    kept = {name: tensor for name, tensor in before.items() if name not in replaced}
    matrices = [name.removesuffix(".weight") for name, tensor in kept.items() if tensor.dim() > 1]
    outcome = Outcome(
        type(original).__name__,
        len(report.blocks),
        tuple(packed),
        dict(report.left),
        tuple(name for name in matrices if not report.left.get(name)),
        tuple(name for name, tensor in kept.items() if not _same(tensor, after.get(name))),
        bool(torch.isfinite(logits_loaded).all()),
        relative(logits_loaded, expected),
        relative(other, expected),
        _replayed(model, logits(original, ids), ids),
        _replayed(out, logits_loaded, ids),
        tuple(note for note in report.notes if "calibration tokens are few" not in note),
        any(event.in_seconds for event in events if isinstance(event, Planned)),
    )
    for path in (model, out, twin):
        shutil.rmtree(path)
    return outcome


def _twin(model: Path, twin: Path, kind: Any, weights: dict[str, Tensor]) -> Any:
    """The float model of transformers, with `weights` by their names in the checkpoint."""
    shutil.copytree(model, twin)
    tensors = {
        name: weights[name] if name in weights else _stacked(name, tensor, weights)
        for name, tensor in tensors_of(model).items()
    }
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    return kind.from_pretrained(twin, dtype=torch.float32).eval()


def _stacked(name: str, original: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Stack the weights or biases of all experts, which are separate in the packed model, as in the float model.

    Of all possible layouts, the one closest to the original tensor is used.
    """
    kind = "bias" if original.dim() == 2 else "weight"
    module = name.removesuffix(".weight").removesuffix("_bias").removesuffix("_proj")
    parts = ("down",) if re.search(r"(down|output_linear|fc2|w2_weight)$", module) else ("gate", "up")
    experts = f"{module.rpartition('.')[0]}.experts".replace(".experts.experts", ".experts")
    stacks = [
        torch.stack([weights[f"{experts}.{e}.{part}_proj.{kind}"].float() for e in range(len(original))])
        for part in parts
    ]  # each (E, N, K) or (E, N)
    ways = [torch.cat(stacks, 1), torch.stack(stacks, 2).flatten(1, 2)]
    ways += [way.transpose(1, -1) for way in ways]
    fitting = [way for way in ways if way.shape == original.shape]
    return min(fitting, key=lambda way: float((way - original).norm())).contiguous()


def _change(model: Any, weight: Tensor) -> None:
    """Rotate the columns of the parameter with these values, so that the norms of its rows do not change."""
    (parameter,) = (p.data for p in model.parameters() if torch.equal(p.data, weight))
    parameter.copy_(parameter.roll(1, dims=1))


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _replayed(model: Path, expected: Tensor, ids: Tensor) -> float | None:
    try:
        skeleton = open_skeleton(Checkpoint.open(model), builders.CPU, torch.float32)
        return relative(streamed_logits(skeleton, ids), expected)
    except llmq.errors.UnsupportedModelError:
        return None


def counted(left: dict[str, str]) -> Counter[tuple[str, str]]:
    """Number of modules kept in float by name and reason, without block and expert numbers in the names."""
    return Counter((re.sub(r"\.\d+(?=\.|$)", ".N", name), reason) for name, reason in left.items())
