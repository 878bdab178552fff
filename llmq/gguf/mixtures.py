"""The architectures of llama.cpp that are mixtures of experts: one row per `model_type`, as in `architectures.py`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llmq.errors import UnsupportedModelError
from llmq.gguf.architecture import (
    FULL,
    GRANITE,
    NORM_ROTATION,
    OFF,
    QKV,
    SIGMOID,
    SILU,
    SOFTMAX,
    WINDOW,
    Architecture,
    Config,
    Stacked,
)
from llmq.gguf.changes import PER_CHANNEL

_QWEN = {"hidden_act": SILU, "use_sliding_window": OFF, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_EXPERT_BIAS = {"gate.e_score_correction_bias": "gate.e_score_correction.bias"}
_ROUTED = {
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
}
_LATENT = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim"
)  # fmt: skip
WITHOUT_RANK = (26, 27)  # numbers of layers
HINT = "use a safetensors format, which can hold any model"


def latent_keys(config: Config, gating: int) -> dict[str, Any]:
    """DeepSeek: sizes of the heads of multi-head latent attention, of which the file has kv_b as one tensor."""
    rank, layers = config["q_lora_rank"], config["num_hidden_layers"]
    if (rank is None) != (layers in WITHOUT_RANK):
        raise UnsupportedModelError(
            f"config.json has q_lora_rank = {rank} and {layers} layers, and llama.cpp's deepseek2 expects no rank in "
            f"models of {' or '.join(map(str, WITHOUT_RANK))} layers, and a rank in all others",
            hint=HINT,
        )
    keys = {
        "attention.key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length": config["v_head_dim"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "expert_gating_func": gating,
    }
    if rank is not None:
        keys["attention.q_lora_rank"] = rank
    return keys


def equal_heads(config: Config) -> dict[str, Any]:
    """OLMoE: llama.cpp expects the norm of keys to have the size of that of queries."""
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise UnsupportedModelError(
            f"config.json has num_key_value_heads = {config['num_key_value_heads']}, and llama.cpp's olmoe computes "
            f"with num_attention_heads = {config['num_attention_heads']}",
            hint=HINT,
        )
    return {}


def convolution_heads(config: Config) -> dict[str, Any]:
    """LFM2: no heads of k in a layer that is a convolution."""
    kv = config["num_key_value_heads"]
    heads = [kv if kind == FULL else 0 for kind in config["layer_types"]]
    return {"attention.head_count_kv": heads, "expert_gating_func": SIGMOID}


MIXTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen2_moe": Architecture(
            "qwen2moe",
            expects={**_QWEN, "norm_topk_prob": OFF, "tie_word_embeddings": OFF},
            biases=QKV,
            free_head_size=False,
        ),
        "qwen3_moe": Architecture("qwen3moe", expects={**_QWEN, "norm_topk_prob": (True,)}),
        "glm4_moe": Architecture(
            "glm4moe",
            renamed=_EXPERT_BIAS,
            keys={**_ROUTED, "norm_topk_prob": "expert_weights_norm"},
            derived=lambda config: {"expert_gating_func": SIGMOID},
            reads=("use_qk_norm",),
            expects={"hidden_act": SILU, "n_group": (1,), "topk_group": (1,)},
            biases=(*QKV, "exp_probs_b"),
            rotations=("default",),
            partial=True,
        ),
        "gpt_oss": Architecture(
            "gpt-oss",
            renamed={"self_attn.sinks": "self_attn.sinks.weight"},
            derived=lambda config: {"expert_feed_forward_length": config["intermediate_size"]},
            sliding=True,
            layers={"layer_types": (WINDOW, FULL)},
            expects={"hidden_act": SILU, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
            biases=(*QKV, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
            rotations=("default", "yarn"),
            stacked=Stacked(in_turn=True, transposed=True),
        ),
        "olmoe": Architecture(
            "olmoe",
            derived=equal_heads,
            expects={"hidden_act": SILU, "norm_topk_prob": OFF, "clip_qkv": (None,), "tie_word_embeddings": OFF},
            rotations=("default",),
            free_head_size=False,
        ),
        "lfm2_moe": Architecture(
            "lfm2moe",
            values={"shortconv.conv.weight": PER_CHANNEL},
            renamed={
                ".expert_bias": ".expert_bias.bias",
                ".w1.": ".gate_proj.",
                ".w2.": ".down_proj.",
                ".w3.": ".up_proj.",
            },
            keys={
                "norm_eps": "attention.layer_norm_rms_epsilon",
                "conv_L_cache": "shortconv.l_cache",
                "num_dense_layers": "leading_dense_block_count",
            },
            derived=convolution_heads,
            layers={"layer_types": ()},
            expects={
                "conv_bias": OFF,
                "norm_topk_prob": (True,),
                "routed_scaling_factor": (1.0,),
                "use_expert_bias": (True,),
            },
            biases=("exp_probs_b",),
            rotations=("default",),
            free_head_size=False,
        ),
        "granitemoe": Architecture(
            "granitemoe",
            rows=NORM_ROTATION,
            renamed={".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
            keys=GRANITE,
            expects={"hidden_act": SILU},
            rotations=("default",),
        ),
        "deepseek_v2": Architecture(
            "deepseek2",
            keys=_ROUTED,
            derived=lambda config: latent_keys(config, SOFTMAX),
            reads=_LATENT,
            expects={
                "hidden_act": SILU,
                "topk_method": ("greedy",),
                "norm_topk_prob": OFF,
                "n_group": (1, None),
                "topk_group": (1, None),
            },
            rotations=("default", "yarn"),
            yarn_squared=True,
        ),
        "deepseek_v3": Architecture(
            "deepseek2",
            renamed=_EXPERT_BIAS,
            keys={
                **_ROUTED,
                "norm_topk_prob": "expert_weights_norm",
                "n_group": "expert_group_count",
                "topk_group": "expert_group_used_count",
            },
            derived=lambda config: latent_keys(config, SIGMOID),
            reads=_LATENT,
            expects={"hidden_act": SILU, "rope_interleave": (True,)},
            biases=("exp_probs_b",),
            rotations=("default", "yarn"),
            yarn_squared=True,
        ),
    }
)
"""`model_type` of config.json -> architecture."""
