"""What llama.cpp computes for a model, as far as its file does not say so: one row of a table for each `model_type`.

llama.cpp has its own code for every architecture, so a file can be written only for those whose code is known to
compute what transformers computes; every row has been run (tests/interop/test_llama_cpp.py).  Where a configuration
asks for something that this code does not do, the file is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from llmq.errors import UnsupportedModelError

SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    name          as GGUF calls it
    interleaved   q and k rotate neighbouring rows, so theirs are reordered (`names.interleave_halves`)
    norm_offset   what is added to the weight of every norm: 1 where the model computes x * (1 + w)
    sliding       `attention.sliding_window` is written; 0 where there is none
    activation    the activations that the code has
    expects       other entries of config.json, and the one value that the code is made for; absent is fine
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    sliding: bool = False
    activation: tuple[str, ...] = SILU
    expects: Mapping[str, Any] = field(default_factory=dict)


_DENSE_QWEN = {"use_sliding_window": False}
_MOE_QWEN = {**_DENSE_QWEN, "decoder_sparse_step": 1, "mlp_only_layers": []}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", interleaved=True),
        "mistral": Architecture("llama", interleaved=True),
        "mixtral": Architecture("llama", interleaved=True),
        "qwen2": Architecture("qwen2", expects=_DENSE_QWEN),
        "qwen3": Architecture("qwen3", expects=_DENSE_QWEN),
        "qwen2_moe": Architecture("qwen2moe", expects={**_MOE_QWEN, "norm_topk_prob": False}),
        "qwen3_moe": Architecture("qwen3moe", expects={**_MOE_QWEN, "norm_topk_prob": True}),
        "phi3": Architecture("phi3", sliding=True),
        "gemma": Architecture("gemma", norm_offset=1.0, activation=TANH_GELU),
        "gemma2": Architecture("gemma2", norm_offset=1.0, sliding=True, activation=TANH_GELU),
        "gemma3_text": Architecture("gemma3", norm_offset=1.0, sliding=True, activation=TANH_GELU),
    }
)
"""`model_type` of config.json -> architecture."""

ALTERNATING: Mapping[str, int] = MappingProxyType({"gemma2": 2, "gemma3": 6})
"""Every so many layers llama.cpp attends to the whole text, in the others through a window."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a configuration; raises UnsupportedModelError where there is none or it asks for something else."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no GGUF file can be written for a model of type {kind!r}: llmq knows {', '.join(ARCHITECTURES)}",
            hint="the safetensors formats hold any model; llama.cpp's convert_hf_to_gguf.py may know the float one",
        )
    found = ARCHITECTURES[kind]
    for entry, value in found.expects.items():
        if entry in config and (config[entry] or value) != value:
            raise _different(found, entry, config[entry], value)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in found.activation:
        raise _different(found, "hidden_act", activation, " or ".join(found.activation))
    _check_layers(found, config)
    _check_scale(found, config)
    return found


def _check_layers(found: Architecture, config: Mapping[str, Any]) -> None:
    """Which layers have a window is no entry of the file but llama.cpp's code."""
    every, kinds = ALTERNATING.get(found.name), config.get("layer_types")
    if every is None or not kinds:
        return
    expected = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]
    if list(kinds) != expected:
        raise _different(found, "layer_types", kinds, f"a full layer after every {every - 1} with a window")


def _check_scale(found: Architecture, config: Mapping[str, Any]) -> None:
    """Attention is scaled by the size of a head, in the largest models by the model's width for each head."""
    scale = config.get("query_pre_attn_scalar")
    usual = (config.get("head_dim"), config["hidden_size"] / config["num_attention_heads"])
    if scale is not None and scale not in usual:
        raise _different(found, "query_pre_attn_scalar", scale, usual[0])


def _different(found: Architecture, entry: str, value: Any, expected: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json has {entry} = {value!r}, and llama.cpp's {found.name} computes with {expected!r}",
        hint="the safetensors formats hold any model",
    )
