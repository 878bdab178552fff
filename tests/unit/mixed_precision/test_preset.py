"""`--preset moe`: which layers get 8 bits, in mixtures, hybrids and dense models, and what wins over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError
from llmq.job import Job
from llmq.mixed_precision.preset import _patterns
from llmq.numerics.scheme import WeightScheme
from tests import builders, mixtures

MakeJob = Callable[..., Job]
SCHEME = WeightScheme(4, 16)
EVERY_BLOCK = "model.layers.*"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """A job for a tiny model of the family `name`, with the preset and other settings."""
    made: dict[str, Path] = {}

    def make(name: str, **settings: Any) -> Job:
        if name not in made:
            config = builders.llama() if name == "llama" else mixtures.CONFIGS[name]()
            made[name] = builders.save_model(tmp_path_factory.mktemp(name), builders.causal_model(config))
        chosen = QuantConfig(**{"method": "rtn", "scheme": SCHEME, "preset": "moe", **settings})
        return Job(made[name], tmp_path_factory.mktemp("out") / "out", chosen, device="cpu")

    return make


def bits(made: Job) -> dict[str, int | None]:
    """Name -> bits of each planned layer."""
    return {plan.name: plan.scheme.weights and plan.scheme.weights.bits for plan in made.plan.layers.values()}


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next"])
def test_every_layer_but_routed_experts_has_eight_bits(job: MakeJob, name: str) -> None:
    chosen = bits(job(name))
    assert {number for layer, number in chosen.items() if ".experts." in layer} == {4}
    assert {number for layer, number in chosen.items() if ".experts." not in layer} == {8}


def test_hybrid_covers_linear_attention_and_shared_experts(job: MakeJob) -> None:
    layers = {layer.partition("layers.")[2] for layer, number in bits(job("qwen3_next")).items() if number == 8}
    assert {"0.linear_attn.in_proj_qkvz", "0.linear_attn.out_proj", "1.self_attn.q_proj"} <= layers
    assert {f"{block}.mlp.shared_expert.{part}_proj" for block in (0, 1) for part in ("gate", "up", "down")} <= layers


def test_overrides_are_few_and_recorded(job: MakeJob) -> None:
    made = job("qwen2_moe")
    layers = [f"self_attn.{part}_proj" for part in "qkvo"]
    layers += [f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    expected = [{"pattern": f"{EVERY_BLOCK}.{layer}", "bits": 8} for layer in layers]
    assert made.report.settings["overrides"] == expected and made.report.settings["preset"] == "moe"
    [note] = made.plan.notes
    assert note in made.report.notes and f"{EVERY_BLOCK}.self_attn.q_proj:bits=8" in note
    assert "14 layers that every token uses" in note and "24 layers of routed experts" in note


def test_recorded_settings_make_the_same_plan(job: MakeJob) -> None:
    made = job("qwen2_moe")
    again = job("qwen2_moe", overrides=made.plan.settings.overrides)
    assert again.plan.settings == made.plan.settings
    assert bits(job("qwen2_moe", overrides=made.plan.settings.overrides, preset=None)) == bits(made)


def test_overrides_and_skips_of_the_user_win(job: MakeJob) -> None:
    mine = (Override(pattern="q_proj", bits=3), Override(pattern="o_proj", group_size=32))
    made = job("qwen2_moe", overrides=mine, skip=("shared_expert.*",))
    schemes = {plan.name.rpartition("layers.0.")[2]: plan.scheme.weights for plan in made.plan.layers.values()}
    assert schemes["self_attn.q_proj"] == WeightScheme(3, 16)
    assert schemes["self_attn.o_proj"] == WeightScheme(8, 32)
    assert schemes["mlp.shared_expert.up_proj"] is None and schemes["self_attn.k_proj"] == WeightScheme(8, 16)


def test_a_quantized_head_has_eight_bits(job: MakeJob) -> None:
    assert bits(job("qwen2_moe", quantize_head=True))["lm_head"] == 8


def test_a_layer_whose_pattern_would_match_an_expert_gets_its_name() -> None:
    always = [(0, "layers.0.mlp.up"), (1, "layers.1.mlp.up"), (1, "layers.1.q")]
    routed = {"layers.1.experts.0.mlp.up"}
    assert list(_patterns(always, routed)) == ["layers.0.mlp.up", "layers.1.mlp.up", "layers.*.q"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {}, "LlamaForCausalLM has no routed experts"),
        ("qwen2_moe", {"format": "awq"}, "awq has one grid for all layers"),
        ("mixtral", {"format": "gguf:q4_k", "scheme": WeightScheme()}, "gguf:q4_k fixes the grid"),
        ("qwen2_moe", {"scheme": WeightScheme(8, 16)}, "--bits 8 gives them to all layers"),
    ],
)
def test_impossible_requests_are_refused(job: MakeJob, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        job(name, **settings)
    assert raised.value.hint


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset is 'dense', expected one of moe"):
        QuantConfig(preset="dense")


def test_gptq_format_holds_the_preset(job: MakeJob) -> None:
    made = job("qwen2_moe", format="gptq", scheme=WeightScheme(4, 32))
    assert set(bits(made).values()) == {4, 8}
    assert "8" in str(made.plan.quantization_config()["dynamic"])
