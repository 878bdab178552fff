"""No entry of a configuration is dropped without a message: it is written, has no effect, or is refused."""

import math
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmq.errors import UnsupportedModelError
from llmq.gguf import metadata, supported
from llmq.gguf.architectures import ARCHITECTURES
from llmq.gguf.names import Names
from llmq.gguf.supported import architecture, language_config

gguf = pytest.importorskip("gguf")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 64, "pad_token_id": None,
}  # fmt: skip
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NORMALIZED = {**MIXTURE, "norm_topk_prob": True}
USUAL: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16}, "gemma2": HEADS, "gemma3_text": HEADS, "qwen2_moe": MIXTURE, "qwen3_moe": NORMALIZED,
    "exaone4": {"sliding_window": None, "sliding_window_pattern": 0, "layer_types": ["full_attention"] * 2},
    "olmoe": {"num_key_value_heads": 4},
}  # fmt: skip
UNUSED = {
    "gpt2": {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"},
}
"""Entries that must have the default value of transformers."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("nemotron", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("exaone4", {"sliding_window": 16, "sliding_window_pattern": 4, "layer_types": None}, "sliding_window"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2}, "topk_method|n_group"),
    ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank"),
    ("deepseek_v3", {"num_hidden_layers": 26}, "q_lora_rank"),
    ("qwen2", {"head_dim": 32}, "head_dim"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "use_sliding_window"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma", {"hidden_act": "relu"}, "hidden_act"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
    ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
    ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
]


def configuration(kind: str, **changes: Any) -> dict[str, Any]:
    return language_config(CONFIG_MAPPING[kind](**{**SIZES, **USUAL.get(kind, {}), **changes}).to_dict())


def keys(kind: str, **changes: Any) -> dict[str, Any]:
    """The keys that are written for a model."""
    config = configuration(kind, **changes)
    writer = gguf.GGUFWriter(None, "test")
    metadata.add_sizes(writer, config, architecture(config))
    return {name.removeprefix("test."): entry.value for name, entry in writer.kv_data[0].items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_entry_of_a_configuration_is_accounted_for(kind: str) -> None:
    assert set(supported.entries(kind)) <= supported.known(ARCHITECTURES[kind]) | UNUSED.get(kind, set())
    assert architecture(configuration(kind)) is ARCHITECTURES[kind]


@pytest.mark.parametrize(("kind", "changes", "entry"), WRONG)
def test_a_value_that_llama_cpp_does_not_compute_with_is_refused(kind: str, changes: Any, entry: str) -> None:
    with pytest.raises(UnsupportedModelError, match=entry):
        keys(kind, **changes)


def test_an_absent_entry_has_the_default_of_transformers() -> None:
    config = configuration("qwen3_moe")
    del config["norm_topk_prob"]
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob = False"):
        architecture(config)


def test_an_entry_that_a_newer_transformers_adds_must_have_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "entries", lambda kind: {"residual_multiplier": 1.0})
    architecture(configuration("llama"))
    with pytest.raises(UnsupportedModelError, match="residual_multiplier = 0.5"):
        architecture(configuration("llama", residual_multiplier=0.5))


def test_a_bias_has_a_place_only_where_llama_cpp_reads_it() -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    config = configuration("llama")
    assert Names(ARCHITECTURES["llama"], config).place(bias) is not None
    assert Names(ARCHITECTURES["qwen3"], config).place(bias) is None
    assert Names(ARCHITECTURES["qwen3"], config).place(bias.replace("bias", "weight")) is not None


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1.0}, 1.0),
        ({"mscale": 0.7, "mscale_all_dim": 1.3}, (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"beta_fast": 32.0, "beta_slow": 0, "truncate": True}, 0.1 * math.log(4) + 1),
    ],
)
def test_scale_of_yarn_is_written_relative_to_that_of_llama_cpp(changes: dict[str, Any], scale: float) -> None:
    written = keys("llama", rope_parameters={**YARN, **changes})
    assert written["rope.scaling.factor"] == 4 and written["rope.scaling.original_context_length"] == 128
    relative = written.get("rope.scaling.attn_factor", 1.0)
    assert relative * (0.1 * math.log(4) + 1) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("changes", "multiplier", "factor"),
    [
        ({"mscale": 0.5, "mscale_all_dim": 0.5}, 0.05, None),
        ({"attention_factor": 1.0}, None, 1 / (0.1 * math.log(4) + 1)),
    ],
)
def test_deepseek_has_the_square_of_the_scale_of_yarn_in_a_key(
    changes: dict[str, Any], multiplier: float | None, factor: float | None
) -> None:
    written = keys("deepseek_v3", rope_parameters={**YARN, **changes})
    assert written.get("rope.scaling.yarn_log_multiplier") == multiplier
    assert written.get("rope.scaling.attn_factor") == factor


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"beta_fast": 4.0}, "beta_fast = 4.0"),
        ("llama", {"beta_slow": 2.0}, "beta_slow = 2.0"),
        ("llama", {"truncate": False}, "truncate = False"),
        ("llama", {"attention_multiplier": 2.0}, "attention_multiplier = 2.0"),
        ("llama", {"rope_type": "dynamic"}, "'dynamic'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("deepseek_v3", {}, "scales queries and keys by 1.13863"),
        ("deepseek_v3", {"mscale": 1.0, "mscale_all_dim": 0.5}, "scales queries and keys by"),
        ("qwen3", {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "'llama3'"),
    ],
)
def test_a_rotation_that_llama_cpp_does_not_compute_is_refused(kind: str, changes: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        keys(kind, rope_parameters={**YARN, **changes})


def test_a_window_that_llama_cpp_ignores_is_reported() -> None:
    for kind in ("mistral", "phi3"):
        config = configuration(kind, sliding_window=16)
        extra = metadata.add_sizes(gguf.GGUFWriter(None, "test"), config, architecture(config))
        assert "the last 16 tokens" in " ".join(extra.notes)


def test_an_entry_that_is_needed_and_missing_is_named() -> None:
    config = configuration("llama")
    del config["max_position_embeddings"]
    with pytest.raises(UnsupportedModelError, match="type 'llama' has no max_position_embeddings"):
        metadata.add_sizes(gguf.GGUFWriter(None, "test"), config, architecture(config))
