"""The architectures of llama.cpp, as far as a GGUF file does not describe them: one table row per `model_type`.

llama.cpp has separate code for every architecture.  So llmq writes files only for architectures whose code is known to
compute the same as transformers; every row was tested (tests/interop/test_llama_cpp.py).  Where a configuration
needs something that this code does not do, no file is written.
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
    """An architecture of llama.cpp.

    name          its name in GGUF
    interleaved   whether neighbouring rows of q and k are rotated together, so that their rows must be reordered
                  (`names.interleave_halves`)
    norm_offset   what is added to the weight of every norm: 1 where the model computes x * (1 + w)
    sliding       whether `attention.sliding_window` is written; 0 where there is none
    activation    the activation functions that the code supports
    expects       other entries of config.json, each with the one value that the code supports; they may be absent
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
"""n, where every n-th layer of llama.cpp attends to the whole text, and the other layers through a window."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a configuration; raises UnsupportedModelError where there is none or where llama.cpp differs."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no GGUF file can be written for a model of type {kind!r}, expected one of {', '.join(ARCHITECTURES)}",
            hint="use a safetensors format; for the float model try llama.cpp's convert_hf_to_gguf.py",
        )
    arch = ARCHITECTURES[kind]
    for entry, value in arch.expects.items():
        if entry in config and (config[entry] or value) != value:
            raise _different(arch, entry, config[entry], value)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in arch.activation:
        raise _different(arch, "hidden_act", activation, " or ".join(arch.activation))
    _check_layers(arch, config)
    _check_scale(arch, config)
    return arch


def _check_layers(arch: Architecture, config: Mapping[str, Any]) -> None:
    """The layers with a window are fixed in the code of llama.cpp; the file does not list them."""
    every, kinds = ALTERNATING.get(arch.name), config.get("layer_types")
    if every is None or not kinds:
        return
    expected = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]
    if list(kinds) != expected:
        raise _different(arch, "layer_types", kinds, f"a full layer after every {every - 1} with a window")


def _check_scale(arch: Architecture, config: Mapping[str, Any]) -> None:
    """llama.cpp scales attention by the head size, in the largest models by hidden size / number of heads."""
    scale = config.get("query_pre_attn_scalar")
    usual = (config.get("head_dim"), config["hidden_size"] / config["num_attention_heads"])
    if scale is not None and scale not in usual:
        raise _different(arch, "query_pre_attn_scalar", scale, usual[0])


def _different(arch: Architecture, entry: str, value: Any, expected: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json has {entry} = {value!r}, and llama.cpp's {arch.name} computes with {expected!r}",
        hint="use a safetensors format, which can hold any model",
    )
