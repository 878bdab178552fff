"""Tiny mixtures of experts, one for each layout in transformers."""

from collections.abc import Callable
from typing import Any

import transformers

from tests import builders

EXPERTS = 4
SIZES: dict[str, Any] = {
    **builders.GROUPED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
}
DENSE_FIRST = {"first_k_dense_replace": 1, "moe_intermediate_size": 48, "n_routed_experts": EXPERTS}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EVERY_HEAD = {"num_key_value_heads": 4}


def sizes(**changes: Any) -> dict[str, Any]:
    """The sizes, without those that are changed to None."""
    return {name: size for name, size in {**SIZES, **changes}.items() if size is not None}


def mixtral() -> Any:
    """Different names on disk: block_sparse_moe, w1 gate, w3 up, w2 down."""
    return transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS)


def qwen2_moe() -> Any:
    """A shared expert behind a gate."""
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64}
    return transformers.Qwen2MoeConfig(**SIZES, **own)


def qwen3_moe() -> Any:
    """The first layer has no experts."""
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 48, "head_dim": 8, "mlp_only_layers": [0]}
    return transformers.Qwen3MoeConfig(**SIZES, **own)


def olmoe() -> Any:
    """Its configuration requests the logits of the routers, as after training."""
    return transformers.OlmoeConfig(**SIZES, num_experts=EXPERTS, output_router_logits=True)


def granitemoe() -> Any:
    """Stacked on disk, as input_linear and output_linear."""
    return transformers.GraniteMoeConfig(**SIZES, num_local_experts=EXPERTS)


def phimoe() -> Any:
    return transformers.PhimoeConfig(**SIZES, num_local_experts=EXPERTS)


def deepseek_v2() -> Any:
    own = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 8}
    return transformers.DeepseekV2Config(**sizes(**EVERY_HEAD), **DENSE_FIRST, **LATENT, **own)


def deepseek_v3() -> Any:
    """Chooses experts in groups, with a correction that affects only the choice."""
    own = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    return transformers.DeepseekV3Config(**sizes(**EVERY_HEAD), **DENSE_FIRST, **LATENT, **own)


def glm4_moe() -> Any:
    own = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 8}
    return transformers.Glm4MoeConfig(**SIZES, **DENSE_FIRST, **own)


def gpt_oss() -> Any:
    """Stacked on disk: transposed, gate and up interleaved, with biases; a clamped activation."""
    own = {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    return transformers.GptOssConfig(**SIZES, **own)


def llama4() -> Any:
    """Stacked on disk and transposed; every expert is called with every token, and most tokens are zero."""
    own = {"num_local_experts": EXPERTS, "intermediate_size_mlp": 64, "head_dim": 8, "interleave_moe_layer_step": 1}
    return transformers.Llama4TextConfig(**{**SIZES, "num_experts_per_tok": 1}, **own)


def nemotron_h() -> Any:
    """Experts without a gate, in addition to a shared expert."""
    own = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 64}
    kinds = {"layers_block_type": ["attention", "moe"], "n_group": 1, "topk_group": 1, "head_dim": 8}
    return transformers.NemotronHConfig(**sizes(num_hidden_layers=None), **own, **kinds)


def jamba() -> Any:
    """Some layers are state-space layers; every second layer has experts."""
    own = {"num_experts": EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return transformers.JambaConfig(**SIZES, **own, **layers)


def qwen3_next() -> Any:
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64, "head_dim": 8}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    kinds = {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    return transformers.Qwen3NextConfig(**SIZES, **own, **heads, **kinds)


CONFIGS: dict[str, Callable[[], Any]] = {
    config.__name__: config
    for config in (
        mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, phimoe, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, llama4,
        nemotron_h, jamba, qwen3_next,
    )
}  # fmt: skip
