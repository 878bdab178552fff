"""Whether llama.cpp computes what a configuration describes: the row of its architecture, or an error.

Every entry of a configuration is in one of four groups: it is written into the file (`WRITTEN`, `Architecture.keys`),
it has no effect on the predictions (`WITHOUT_EFFECT`), the row lists the values that the code supports
(`Architecture.expects`, `Architecture.layers`), or it is unknown, and then it must have the default value of
transformers.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from llmq.errors import UnsupportedModelError
from llmq.gguf.architecture import CAPS, FULL, Architecture
from llmq.gguf.architectures import ARCHITECTURES

WRITTEN = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
        "rms_norm_eps", "rope_parameters", "num_local_experts", "num_experts", "num_experts_per_tok",
        "top_k_experts", "enable_moe_block",
        "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window", "attn_logit_softcapping",
        "final_logit_softcapping", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "n_routed_experts",
    }
)  # fmt: skip
"""Entries of a configuration that keys and tensors of the file describe."""

CHECKED = frozenset(
    {"layer_types", "query_pre_attn_scalar", "attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "conv_bias"}
)
"""Entries that are compared with the code of llama.cpp below, or that show in the names of the tensors."""

WITHOUT_EFFECT = frozenset(
    {
        "initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop",
        "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "max_window_layers", "hidden_dropout",
        "residual_dropout", "embedding_dropout", "classifier_dropout", "attn_pdrop", "summary_type", "is_decoder",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "reorder_and_upcast_attn", "num_mtp_layers", "eod_token_id",
    }
)  # fmt: skip
"""Entries for training only, and those that others replace, like `max_window_layers` by `layer_types`."""


OPTIONAL_SIZES = frozenset({"intermediate_size", "num_key_value_heads", "sliding_window"})
"""Entries that some models do not read, although they may stand in their config.json."""


class Entries(dict[str, Any]):
    """The entries of a configuration. One that is needed and missing raises UnsupportedModelError."""

    def __missing__(self, name: str) -> Any:
        raise UnsupportedModelError(
            f"no GGUF file can be written: the configuration of type {self.get('model_type')!r} has no {name}",
            hint="use a safetensors format: they hold any model",
        )


def language_config(config: Mapping[str, Any]) -> Entries:
    """The configuration of the language model: that of its part where `config` has several, with the usual names.

    Entries that a model names differently (`n_embd`) are there under both names. Raises UnsupportedModelError for
    values that transformers refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return Entries(config)
    try:
        configuration = CONFIG_MAPPING[kind].from_dict(dict(config)).get_text_config(decoder=True)
    except Exception as error:  # the checks of transformers raise many types of errors
        raise UnsupportedModelError(
            f"no GGUF file can be written: transformers cannot read the configuration of type {kind!r}: {error}",
            hint="check config.json",
        ) from error
    usual = {name: getattr(configuration, own) for name, own in configuration.attribute_map.items()}
    ignored = OPTIONAL_SIZES - {one.name for one in dataclasses.fields(configuration)}
    return Entries({**usual, **{name: value for name, value in configuration.to_dict().items() if name not in ignored}})


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
    if "per_layer_config" not in arch.reads:
        yield "per_layer_config", config.get("per_layer_config"), (None, {})
    yield "attention_chunk_size", config.get("attention_chunk_size"), (None,)
    for entry, supported in arch.expects.items():
        yield entry, config.get(entry, defaults.get(entry)), supported
    for entry in defaults.keys() - known(arch):
        yield entry, config.get(entry, defaults[entry]), (defaults[entry],)


def known(arch: Architecture) -> set[str]:
    """The entries that are written, checked or without effect, so that they may have any value here."""
    return {*WRITTEN, *CHECKED, *WITHOUT_EFFECT, *arch.expects, *arch.keys, *arch.layers, *arch.reads}


def entries(kind: str) -> dict[str, Any]:
    """The entries that configurations of this `model_type` have and other models do not, with their defaults."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = {one.name for one in dataclasses.fields(PreTrainedConfig)}
    declared = CONFIG_MAPPING[kind]()
    defaults = declared.to_dict()
    return {one.name: defaults.get(one.name) for one in dataclasses.fields(declared) if one.name not in usual}


def _check_layers(arch: Architecture, config: Mapping[str, Any]) -> None:
    """What differs between layers is fixed in the code of llama.cpp; the file does not list it."""
    for entry, period in {"layer_types": (FULL,), **arch.layers}.items():
        values = config.get(entry)
        if values and period and list(values) != list(itertools.islice(itertools.cycle(period), len(values))):
            raise _different(arch, entry, values, f"{', '.join(map(str, period))} in turn")


def _check_heads(arch: Architecture, config: Mapping[str, Any]) -> None:
    """Head size and the scale of attention: by the head size, in the largest Gemma by hidden size / number of heads."""
    wide = config["hidden_size"] / config["num_attention_heads"]
    head = config.get("head_dim") or wide
    if head != wide and not arch.free_head_size:
        raise _different(arch, "head_dim", head, f"hidden_size / num_attention_heads = {wide:g}")
    scale, expected = config.get("query_pre_attn_scalar"), attention_scale(arch, config)
    if scale is not None and scale != expected:
        raise _different(arch, "query_pre_attn_scalar", scale, f"{expected:g}")


def attention_scale(arch: Architecture, config: Mapping[str, Any]) -> float:
    """The `query_pre_attn_scalar` that llama.cpp computes with."""
    wide = config["hidden_size"] / config["num_attention_heads"]
    return float(wide if arch.wide_scale == config.get("num_hidden_layers", 0) else config.get("head_dim") or wide)


def _different(arch: Architecture, entry: str, value: Any, expected: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json has {entry} = {value!r}, and llama.cpp's {arch.name} computes with {expected}",
        hint="use a safetensors format, which can hold any model",
    )
