"""Tiny random models of many architectures, and the result of quantizing each: `tests/e2e/test_architectures.py` checks
the results, `scripts/docs.py models` writes the table in docs/MODELS.md.

The list has model types of transformers' mapping of causal language models.  One table of small sizes is used for all:
a configuration takes the sizes for which it has a field.  The value of a model type holds settings that are specific to
the architecture, for example which layers have attention and where experts begin.
"""

import inspect
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders
from tests.runs import float_equivalent, logits, relative, streamed_logits, tensors_of

FIELDS: dict[str, Any] = {
    "vocab_size": builders.VOCABULARY, "vocab_size_per_layer_input": builders.VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_window_size"), builders.WINDOW),
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    **dict.fromkeys(("mamba_d_state", "state_size"), 8), "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1), "expand": 2,
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 16),
    "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16, "laurel_rank": 16, "num_kv_shared_layers": 0,
}  # fmt: skip
ABSENT = object()  # the field keeps the default of the configuration
LATENT = {"head_dim": ABSENT, "num_key_value_heads": 4}  # latent attention has separate head sizes
NO_PADDING = {"pad_token_id": None}  # transformers sets the embedding of the padding token to zero when loading
ATTENTION_SECOND = {"layer_types": ["linear_attention", "full_attention"]}

DENSE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "ctrl": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {"activation_sparsity_pattern": None},
    "gemma4_text": {},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "minicpm3": {**LATENT, **NO_PADDING},
    "ministral": {},
    "mistral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlnet": {},
    "youtu": {**LATENT, **NO_PADDING},
}
HYBRID: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {},
    "falcon_mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "olmo_hybrid": ATTENTION_SECOND,
    "qwen3_5_text": ATTENTION_SECOND,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {},
    "xlstm": {},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["hybrid", "mamba", "hybrid", "mamba"]},
}
LEFT_OUT = {
    "bart": "and similar (pegasus, marian, whisper, …): decoders of encoder-decoder models",
    "bert": "and similar: encoders that a configuration can turn into decoders; they are not used to generate text",
    "blt": "its class in transformers needs byte patches in addition to the text",
    "dbrx": "transformers cannot build it from its own configuration",
    "hrm_text": "two lists of blocks, each run several times per token",
    "longcat_flash": "experts without weights are counted like experts with weights",
    "xlm": "its blocks are spread over several lists: attention in one, MLPs in another",
    "zamba2": "transformers cannot run it at toy size; the related Zamba is in the list",
}
EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "jetmoe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {},
    "minimax": {},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "num_hidden_layers": ABSENT,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": ATTENTION_SECOND,
    "qwen3_moe": {},
    "qwen3_next": ATTENTION_SECOND,
    "solar_open": {},
}
PICTURES = {"image_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 64, "out_hidden_size": 64}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text"},
        "vision_config": {"model_type": "siglip_vision_model", **PICTURES},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **PICTURES},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **PICTURES},
    },
    "qwen2_vl": {
        "text_config": {
            "model_type": "qwen2_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"model_type": "qwen2_vl", **PICTURES, "hidden_size": 64},
    },
}
ARCHITECTURES = {**DENSE, **HYBRID, **EXPERTS, **VISION}

SETTINGS: dict[str, Any] = {"method": "gptq", "group_size": 16, "scales": "minmax", "samples": 4, "seqlen": 16}
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

    @property
    def routers(self) -> list[str]:
        """Packed routers and gates, which no engine expects to be packed."""
        return [name for name in self.packed if ROUTERS.search(name)]


def tiny(model_type: str) -> Any:
    """The configuration of a tiny model of this type."""
    kind = CONFIG_MAPPING[model_type]
    own = {
        name: _sizes(CONFIG_MAPPING[value["model_type"]], value) if name.endswith("_config") else value
        for name, value in ARCHITECTURES[model_type].items()
    }
    config = kind(**_sizes(kind, own))
    if model_type in VISION:
        config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]]
    return config


def _sizes(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Those of FIELDS that a configuration of this class has, updated with `own`."""
    known = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    known |= set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    chosen = {name: value for name, value in FIELDS.items() if name in known}
    for alias, name in kind.attribute_map.items():
        if name in chosen:
            chosen.pop(alias, None)
    return {name: value for name, value in {**chosen, **own}.items() if value is not ABSENT}


def examine(model_type: str, folder: Path, text: Path, **settings: Any) -> Outcome:
    """Quantize, save, load and run a tiny model of this type; `folder` is empty before and afterwards.

    `settings` are those of `llmq.quantize`, on top of SETTINGS.
    """
    model, out, twin = folder / "model", folder / "out", folder / "twin"
    ids = builders.tokens(2, 16)
    original = builders.causal_model(tiny(model_type))
    builders.save_model(model, original)
    report = llmq.quantize(str(model), out, device="cpu", calibration=[text], **{**SETTINGS, **settings})
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
    parts = ("down",) if re.search(r"(down|output_linear|fc2)$", module) else ("gate", "up")
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
