"""The architectures of llama.cpp, as far as a GGUF file does not describe them: one table row per `model_type`.

llama.cpp has separate code for every architecture.  So llmq writes files only for architectures whose code is known to
compute the same as transformers; every row was tested (tests/interop/test_llama_cpp.py).  Where a configuration
needs something that this code does not do, no file is written (`supported.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from llmq.gguf.architecture import (
    ALL_LINEAR,
    CAPS,
    FULL,
    GRANITE,
    LAYER_NORM,
    LINEAR,
    NORM_ROTATION,
    NORMS,
    OFF,
    ONE_MORE_NORM,
    QKV,
    SILU,
    TANH_GELU,
    WINDOW,
    Architecture,
)
from llmq.gguf.changes import PER_CHANNEL, TRANSPOSED, joined_heads
from llmq.gguf.hybrids import (
    DT_BIAS,
    GATED_DELTA,
    GATED_DELTA_KEYS,
    GEMMA4_EXPERTS,
    TILED,
    convolution_keys,
    divided_qkvz,
    gated_delta_keys,
    gemma4_keys,
    proportional_factors,
    tiled_columns,
    visual_keys,
)
from llmq.gguf.mixtures import MIXTURES

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
_CAUSAL = {"use_bidirectional_attention": OFF}
_GEMMA = {**_CAUSAL, "hidden_activation": TANH_GELU}
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
        **MIXTURES,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": _LLAMA,
        "qwen2": Architecture("qwen2", expects=_QWEN, biases=QKV, free_head_size=False),
        "qwen3": Architecture("qwen3", expects=_QWEN),
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
            "granite", rows=NORM_ROTATION, keys=GRANITE, expects={"hidden_act": SILU}, biases=ALL_LINEAR
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
            named=GEMMA4_EXPERTS,
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
        "ernie4_5": Architecture("ernie4_5", expects={"hidden_act": SILU, "use_bias": OFF}, rotations=("default",)),
        "seed_oss": Architecture(
            "seed_oss", expects={"hidden_act": SILU, "attention_out_bias": OFF}, biases=QKV, rotations=("default",)
        ),
        "arcee": replace(
            _LLAMA, name="arcee", expects={"hidden_act": ("relu2",)}, biases=(), rotations=("default", "yarn")
        ),
        "exaone4": Architecture(
            "exaone4",
            expects={"hidden_act": SILU, "sliding_window": (None,), "sliding_window_pattern": (0, None)},
            rotations=("default",),
        ),
        "nemotron": Architecture(
            "nemotron",
            values=ONE_MORE_NORM,
            keys={"norm_eps": LAYER_NORM},
            expects={"hidden_act": ("relu2",), "tie_word_embeddings": OFF},
            biases=NORMS,
            rotations=("default",),
            partial=True,
        ),
        "hunyuan_v1_dense": Architecture("hunyuan-dense", expects={"hidden_act": SILU}, rotations=("default",)),
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
