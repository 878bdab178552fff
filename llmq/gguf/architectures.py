"""The architectures of llama.cpp, as far as a GGUF file does not describe them: one table row per `model_type`.

llama.cpp has separate code for every architecture.  So llmq writes files only for architectures whose code is known to
compute the same as transformers; every row was tested (tests/interop/test_llama_cpp.py).  Where a configuration
needs something that this code does not do, no file is written (`supported.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from llmq.gguf.architecture import FULL, LINEAR, WINDOW, Architecture, Stacked
from llmq.gguf.changes import ONE_MORE, PER_CHANNEL, TRANSPOSED, interleaved, joined_heads
from llmq.gguf.hybrids import (
    DT_BIAS,
    GATED_DELTA,
    GATED_DELTA_KEYS,
    TILED,
    convolution_keys,
    divided_qkvz,
    gated_delta_keys,
    gemma4_keys,
    proportional_factors,
    tiled_columns,
    visual_keys,
)

SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
OFF = (False, None)
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
QKV = ("attn_q", "attn_k", "attn_v")
ALL_LINEAR = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")
NORM_ROTATION = {
    "attn_q": interleaved("attn_q", "num_attention_heads"),
    "attn_k": interleaved("attn_k", "num_key_value_heads"),
}
ONE_MORE_NORM = {"*_norm.weight": ONE_MORE}
SIGMOID = 2  # `expert_gating_func`
LAYER_NORM = "attention.layer_norm_epsilon"

_LLAMA = Architecture(
    "llama",
    rows=NORM_ROTATION,
    expects={"hidden_act": SILU},
    biases=ALL_LINEAR,
    rotations=("default", "linear", "yarn", "llama3", "longrope"),
)
_HYBRID = {"hidden_act": SILU, "decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}
_EVERY_FOURTH = {"layer_types": (LINEAR,) * 3 + (FULL,)}
_QWEN = {"hidden_act": SILU, "use_sliding_window": OFF}
_MOE_QWEN = {**_QWEN, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_CAUSAL = {"use_bidirectional_attention": OFF}
_GEMMA = {**_CAUSAL, "hidden_activation": TANH_GELU}
_GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_COHERE = Architecture(
    "command-r",
    keys={"layer_norm_eps": LAYER_NORM, "logit_scale": "logit_scale"},
    expects={"hidden_act": SILU, "attention_bias": OFF, "use_qk_norm": OFF, "tie_word_embeddings": (True,)},
    free_head_size=False,
)
_OLMO = Architecture("olmo2", expects={"hidden_act": SILU}, free_head_size=False)

_QWEN35 = Architecture(
    "qwen35",
    rows=TILED,
    columns={"ssm_out": tiled_columns},
    values=GATED_DELTA,
    renamed=DT_BIAS,
    keys=GATED_DELTA_KEYS,
    derived=gated_delta_keys,
    reads=("linear_value_head_dim",),
    layers=_EVERY_FOURTH,
    expects={"hidden_act": SILU},
    biases=("ssm_dt",),
    rotations=("default",),
    partial=True,
)

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
        "gemma": Architecture("gemma", values=ONE_MORE_NORM, expects={**_CAUSAL, "hidden_act": TANH_GELU}),
        "gemma2": Architecture(
            "gemma2",
            values=ONE_MORE_NORM,
            sliding=True,
            layers={"layer_types": (WINDOW, FULL)},
            expects=_GEMMA,
            requires=CAPS,
            wide_scale=46,
        ),
        "gemma3_text": Architecture(
            "gemma3",
            values=ONE_MORE_NORM,
            sliding=True,
            layers={"layer_types": (WINDOW,) * 5 + (FULL,)},
            expects=_GEMMA,
            wide_scale=62,
            local_rotation=True,
        ),
        "glm4": Architecture("glm4", expects={"hidden_act": SILU}, biases=QKV, rotations=("default",), partial=True),
        "granite": Architecture(
            "granite", rows=NORM_ROTATION, keys=_GRANITE, expects={"hidden_act": SILU}, biases=ALL_LINEAR
        ),
        "olmo2": _OLMO,
        "olmo3": replace(_OLMO, sliding=True, layers={"layer_types": (WINDOW,) * 3 + (FULL,)}, rotations=("default",)),
        "qwen3_next": replace(
            _QWEN35,
            name="qwen3next",
            rows={"ssm_in": divided_qkvz},
            columns={},
            expects={**_HYBRID, "norm_topk_prob": (True,)},
        ),
        "qwen3_5_text": _QWEN35,
        "qwen3_5_moe_text": replace(_QWEN35, name="qwen35moe"),
        "qwen3_vl_text": Architecture(
            "qwen3vl", derived=visual_keys, expects={"hidden_act": SILU}, rotations=("default",)
        ),
        "glm4_moe": Architecture(
            "glm4moe",
            renamed={"gate.e_score_correction_bias": "gate.e_score_correction.bias"},
            keys={
                "n_shared_experts": "expert_shared_count",
                "first_k_dense_replace": "leading_dense_block_count",
                "routed_scaling_factor": "expert_weights_scale",
                "norm_topk_prob": "expert_weights_norm",
            },
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
        "lfm2": Architecture(
            "lfm2",
            values={"shortconv.conv.weight": PER_CHANNEL},
            keys={"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
            derived=convolution_keys,
            reads=("block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "full_attn_idxs"),
            layers={"layer_types": ()},
            expects={"conv_bias": OFF},
            rotations=("default",),
            free_head_size=False,
        ),
        "gemma4_text": Architecture(
            "gemma4",
            renamed={".layer_scalar": ".layer_scalar.weight"},
            derived=gemma4_keys,
            reads=(
                "per_layer_config",
                "attention_k_eq_v",
                "num_kv_shared_layers",
                "use_double_wide_mlp",
                "hidden_size_per_layer_input",
                "vocab_size_per_layer_input",
            ),
            factors=proportional_factors,
            sliding=True,
            layers={"layer_types": ()},
            expects={
                "hidden_activation": TANH_GELU,
                "enable_moe_block": OFF,
                "use_bidirectional_attention": (None, "vision"),
            },
            rotations=("default", "proportional"),
            local_rotation=True,
        ),
        "cohere2": replace(
            _COHERE,
            name="cohere2",
            sliding=True,
            layers={"layer_types": (WINDOW,) * 3 + (FULL,)},
            expects={"hidden_act": SILU, "attention_bias": OFF, "tie_word_embeddings": (True,)},
        ),
        "smollm3": Architecture(
            "smollm3",
            rows=NORM_ROTATION,
            layers={"layer_types": (FULL,), "no_rope_layers": (1, 1, 1, 0)},
            expects={"hidden_act": SILU, "use_sliding_window": OFF, "no_rope_layer_interval": (4,)},
            free_head_size=False,
        ),
        "cohere": _COHERE,
        "starcoder2": Architecture(
            "starcoder2",
            keys={"norm_epsilon": LAYER_NORM},
            expects={"hidden_act": TANH_GELU, "use_bias": (True,)},
            biases=(*ALL_LINEAR, *NORMS),
            free_head_size=False,
        ),
        "gpt2": Architecture(
            "gpt2",
            values={"*attn_qkv.weight": TRANSPOSED, "*attn_output.weight": TRANSPOSED, "*ffn_*.weight": TRANSPOSED},
            keys={"layer_norm_epsilon": LAYER_NORM},
            expects={"activation_function": TANH_GELU},
            biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down", *NORMS),
            rotations=(),
            free_head_size=False,
        ),
        "gpt_neox": Architecture(
            "gptneox",
            rows={"attn_qkv": joined_heads},
            keys={"layer_norm_eps": LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
            expects={"hidden_act": ("gelu", *TANH_GELU), "attention_bias": (True,)},
            biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down", *NORMS),
            partial=True,
            free_head_size=False,
        ),
        "phi": Architecture(
            "phi2",
            keys={"layer_norm_eps": LAYER_NORM},
            expects={"hidden_act": TANH_GELU, "qk_layernorm": OFF},
            biases=(*QKV, "attn_output", "ffn_up", "ffn_down", "attn_norm"),
            partial=True,
            free_head_size=False,
        ),
        "stablelm": Architecture(
            "stablelm",
            keys={"layer_norm_eps": LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
            expects={"hidden_act": SILU, "qk_layernorm": OFF},
            biases=(*QKV, *NORMS),
            partial=True,
            free_head_size=False,
        ),
    }
)
"""`model_type` of config.json -> architecture."""
