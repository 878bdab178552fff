"""Rows, keys and tensors of models whose layers differ: linear attention (Qwen), convolutions (LFM2), Gemma 4."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmq.gguf.architecture import FULL, Config
from llmq.gguf.changes import DECAY, ONE_MORE, PER_CHANNEL, Order, Rows, Value

NEVER = 1e30  # divisor of a frequency: the channel is not rotated
GATED_DELTA: Mapping[str, Value] = {
    "ssm_norm.weight": Value(lambda weight: weight, lambda weight: weight),
    "*_norm.weight": ONE_MORE,
    "ssm_a": DECAY,
    "ssm_conv1d.weight": PER_CHANNEL,
}
"""The norms of a Qwen hybrid multiply by 1 + w, except for that of linear attention."""
GATED_DELTA_KEYS = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
GEMMA4_EXPERTS = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
}
DT_BIAS = {"linear_attn.dt_bias": "linear_attn.dt_proj.bias"}


def gated_delta_keys(config: Config) -> dict[str, Any]:
    """The keys of Qwen hybrids that are computed; sections of the rotation count for images only."""
    sections = config["rope_parameters"].get("mrope_section") or [11, 11, 10]
    return {
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": 4,
        "rope.dimension_sections": [*sections, *[0] * (4 - len(sections))],
    }


def divided_qkvz(config: Config) -> dict[str, Order]:
    """Qwen3-Next has q, k, v and z of a key head one after the other; the file has q, k, v of all heads, and z."""
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    rows = np.arange(heads * 2 * (size + values)).reshape(heads, -1)
    q, k, v, z = np.split(rows, [size, 2 * size, 2 * size + values], axis=1)
    return {"attn_qkv": np.concatenate([part.ravel() for part in (q, k, v)]), "attn_gate": z.ravel()}


def tiled_values(config: Config, width: int) -> Order:
    """Value heads, `width` rows each: sorted by their key head in the model, in the file by their number in it."""
    heads = config["linear_num_key_heads"]
    return np.arange(config["linear_num_value_heads"] * width).reshape(heads, -1, width).swapaxes(0, 1).ravel()


def tiled(name: str, *, keys: bool = False, single: bool = False) -> Rows:
    """The rows of a tensor with one part per value head; q and k are in front of it if `keys`."""

    def rows(config: Config) -> dict[str, Order]:
        first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] if keys else 0
        order = tiled_values(config, 1 if single else config["linear_value_head_dim"])
        return {name: np.concatenate([np.arange(first), first + order])}

    return rows


TILED: Mapping[str, Rows] = {
    "attn_qkv": tiled("attn_qkv", keys=True),
    "attn_gate": tiled("attn_gate"),
    "ssm_conv1d": tiled("ssm_conv1d", keys=True),
    "ssm_alpha": tiled("ssm_alpha", single=True),
    "ssm_beta": tiled("ssm_beta", single=True),
    "ssm_a": tiled("ssm_a", single=True),
    "ssm_dt": tiled("ssm_dt", single=True),
}


def tiled_columns(config: Config) -> Order:
    """The columns of the projection behind linear attention: its inputs are the value heads."""
    return tiled_values(config, config["linear_value_head_dim"])


def convolution_keys(config: Config) -> dict[str, Any]:
    """LFM2: no heads of k in a layer that is a convolution; the width of the MLP follows from three entries."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        step, factor = config["block_multiple_of"], config["block_ffn_dim_multiplier"]
        width = int(2 * width / 3)
        width = step * -(-int(width if factor is None else factor * width) // step)
    kv = config["num_key_value_heads"]
    heads = [kv if kind == FULL else 0 for kind in config["layer_types"]]
    return {"feed_forward_length": width, "attention.head_count_kv": heads}


def of_layer(config: Config, layer: int, entry: str) -> Any:
    """An entry of the configuration for one layer; transformers lists the layers that differ."""
    own = config.get("per_layer_config", {}).get(str(layer), {})
    return own.get(entry, config[entry])


def gemma4_keys(config: Config) -> dict[str, Any]:
    """Gemma 4 has other heads in full layers, and layers that use keys and values of earlier ones."""
    kinds, shared, size = config["layer_types"], config["num_kv_shared_layers"], full_head(config)
    wide = [i >= len(kinds) - shared and config["use_double_wide_mlp"] for i in range(len(kinds))]
    return {
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": size,
        "rope.dimension_count_swa": config["head_dim"],
        "attention.sliding_window_pattern": [kind != FULL for kind in kinds],
        "attention.head_count_kv": [of_layer(config, i, "num_key_value_heads") for i in range(len(kinds))],
        "attention.shared_kv_layers": shared,
        "feed_forward_length": [config["intermediate_size"] * (2 if twice else 1) for twice in wide],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
    }


def full_head(config: Config) -> int:
    """The head size of the layers that attend to the whole text."""
    return int(of_layer(config, config["layer_types"].index(FULL), "head_dim"))


def proportional_factors(config: Config) -> dict[str, Any]:
    """The divisors of the frequencies of full layers: only the first part of the channels is rotated."""
    size = full_head(config)
    rotated = int(config["rope_parameters"][FULL].get("partial_rotary_factor", 1.0) * size / 2)
    factors = np.full(size // 2, NEVER, dtype=np.float32)
    factors[:rotated] = 1.0
    return {"rope_freqs.weight": factors}


def visual_keys(config: Config) -> dict[str, Any]:
    """Qwen3-VL: sections of the rotation count for images only, and so do the layers that take image features."""
    sections = config["rope_parameters"].get("mrope_section") or [24, 20, 20]
    return {"rope.dimension_sections": [*sections, *[0] * (4 - len(sections))], "n_deepstack_layers": 0}
