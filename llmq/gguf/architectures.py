"""The architectures of llama.cpp, as far as a GGUF file does not describe them: one table row per `model_type`.

llama.cpp has separate code for every architecture.  So llmq writes files only for architectures whose code is known to
compute the same as transformers; every row was tested (tests/interop/test_llama_cpp.py).  Where a configuration
needs something that this code does not do, no file is written.

Every entry of a configuration is in one of four groups: it is written into the file (`WRITTEN`), it has no effect on
the predictions (`WITHOUT_EFFECT`), the row lists the values that the code supports (`Architecture.expects`), or it is
unknown, and then it must have the default value of transformers.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from llmq.errors import UnsupportedModelError

SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh",)
OFF = (False, None)
FULL, WINDOW = "full_attention", "sliding_attention"

WRITTEN = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
        "rms_norm_eps", "rope_parameters", "num_local_experts", "num_experts", "num_experts_per_tok",
        "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window", "attn_logit_softcapping",
        "final_logit_softcapping", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    }
)  # fmt: skip
"""Entries of a configuration that keys and tensors of the file describe."""

CHECKED = frozenset({"layer_types", "query_pre_attn_scalar", "attention_bias", "mlp_bias", "qkv_bias"})
"""Entries that are compared with the code of llama.cpp below, or that show in the names of the tensors."""

WITHOUT_EFFECT = frozenset(
    {
        "initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop",
        "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "max_window_layers",
    }
)  # fmt: skip
"""Entries for training only, and `max_window_layers`, which `layer_types` replaces."""

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
QKV = ("attn_q", "attn_k", "attn_v")
ALL_LINEAR = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    name            its name in GGUF
    interleaved     whether neighbouring rows of q and k are rotated together, so that their rows must be reordered
                    (`names.interleave_halves`)
    norm_offset     what is added to the weight of every norm: 1 where the model computes x * (1 + w)
    sliding         whether `attention.sliding_window` is written; 0 where there is none
    full_every      n, where every n-th layer attends to the whole text and the other layers through the window; 1
                    where all layers attend to the whole text, also if the model has a window
    expects         entries of config.json, each with the values that the code supports
    requires        entries that must have a value other than 0, because the code has its own default for them
    biases          the weights that may have a bias, by their names in GGUF
    rotations       the types of rotary embedding that the code has tensors or keys for
    partial         whether the code can rotate a part of a head
    free_head_size  whether the head size may differ from hidden size / number of heads
    wide_scale      the number of layers of the model whose attention is scaled by hidden size / number of heads
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    sliding: bool = False
    full_every: int = 1
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    rotations: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    free_head_size: bool = True
    wide_scale: int | None = None


_LLAMA = Architecture(
    "llama",
    interleaved=True,
    expects={"hidden_act": SILU},
    biases=ALL_LINEAR,
    rotations=("default", "linear", "yarn", "llama3", "longrope"),
)
_QWEN = {"hidden_act": SILU, "use_sliding_window": OFF}
_MOE_QWEN = {**_QWEN, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_CAUSAL = {"use_bidirectional_attention": OFF}
_GEMMA = {**_CAUSAL, "hidden_activation": TANH_GELU}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": _LLAMA,
        "qwen2": Architecture("qwen2", expects=_QWEN, biases=QKV, free_head_size=False),
        "qwen3": Architecture("qwen3", expects=_QWEN),
        "qwen2_moe": Architecture(
            "qwen2moe",
            expects={**_MOE_QWEN, "norm_topk_prob": OFF, "tie_word_embeddings": OFF},
            biases=QKV,
            free_head_size=False,
        ),
        "qwen3_moe": Architecture("qwen3moe", expects={**_MOE_QWEN, "norm_topk_prob": (True,)}),
        "phi3": Architecture(
            "phi3",
            sliding=True,
            expects={"hidden_act": SILU},
            rotations=("default", "longrope"),
            partial=True,
            free_head_size=False,
        ),
        "gemma": Architecture("gemma", norm_offset=1.0, expects={**_CAUSAL, "hidden_act": TANH_GELU}),
        "gemma2": Architecture(
            "gemma2", norm_offset=1.0, sliding=True, full_every=2, expects=_GEMMA, requires=CAPS, wide_scale=46
        ),
        "gemma3_text": Architecture(
            "gemma3", norm_offset=1.0, sliding=True, full_every=6, expects=_GEMMA, wide_scale=62
        ),
    }
)
"""`model_type` of config.json -> architecture."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a configuration; raises UnsupportedModelError where there is none or where llama.cpp differs."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no GGUF file can be written for a model of type {kind!r}, expected one of {', '.join(ARCHITECTURES)}",
            hint="use a safetensors format; for the float model try llama.cpp's convert_hf_to_gguf.py",
        )
    arch = ARCHITECTURES[kind]
    for entry, value, supported in _fixed(kind, arch, config):
        if value not in supported:
            raise _different(arch, entry, value, " or ".join(str(one) for one in supported if one is not None))
    for entry in CAPS:
        value = config.get(entry)
        if value == 0 or (value is None and entry in arch.requires):
            raise _different(arch, entry, value, "a value that is not 0")
    _check_layers(arch, config)
    _check_heads(arch, config)
    return arch


def _fixed(kind: str, arch: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Entries with a fixed value: (entry, the value of the model, the values that are supported)."""
    defaults = entries(kind)
    yield "is_causal", config.get("is_causal"), (True, None)
    yield "attention_chunk_size", config.get("attention_chunk_size"), (None,)
    for entry, supported in arch.expects.items():
        yield entry, config.get(entry, defaults.get(entry)), supported
    for entry in defaults.keys() - WRITTEN - CHECKED - WITHOUT_EFFECT - arch.expects.keys():
        yield entry, config.get(entry, defaults[entry]), (defaults[entry],)


def entries(kind: str) -> dict[str, Any]:
    """The entries that configurations of this `model_type` have and other models do not, with their defaults."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = {one.name for one in dataclasses.fields(PreTrainedConfig)}
    declared = CONFIG_MAPPING[kind]()
    return {one.name: getattr(declared, one.name) for one in dataclasses.fields(declared) if one.name not in usual}


def _check_layers(arch: Architecture, config: Mapping[str, Any]) -> None:
    """The layers with a window are fixed in the code of llama.cpp; the file does not list them."""
    every, kinds = arch.full_every, config.get("layer_types")
    if not kinds:
        return
    expected = [WINDOW if (i + 1) % every else FULL for i in range(len(kinds))]
    if list(kinds) != expected:
        raise _different(arch, "layer_types", kinds, f"a full layer after every {every - 1} with a window")


def _check_heads(arch: Architecture, config: Mapping[str, Any]) -> None:
    """Head size and the scale of attention: by the head size, in the largest Gemma by hidden size / number of heads."""
    wide = config["hidden_size"] / config["num_attention_heads"]
    head = config.get("head_dim") or wide
    if head != wide and not arch.free_head_size:
        raise _different(arch, "head_dim", head, f"hidden_size / num_attention_heads = {wide:g}")
    scale = config.get("query_pre_attn_scalar")
    expected = wide if arch.wide_scale == config.get("num_hidden_layers", 0) else head
    if scale is not None and scale != expected:
        raise _different(arch, "query_pre_attn_scalar", scale, f"{expected:g}")


def _different(arch: Architecture, entry: str, value: Any, expected: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json has {entry} = {value!r}, and llama.cpp's {arch.name} computes with {expected}",
        hint="use a safetensors format, which can hold any model",
    )
