"""Which block type each weight gets, and settings that cannot be combined with a recipe."""

from typing import Any

import pytest

from llmq.config import GGUF_GRIDS, Override, QuantConfig
from llmq.errors import ConfigError, UnsupportedModelError
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme

pytest.importorskip("gguf")
from llmq.gguf import recipes

LINEARS = {
    "self_attn.q_proj": (512, 512),
    "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.up_proj": (1024, 512),
    "mlp.down_proj": (512, 1024),
}


def llama(layers: int = 32, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": layers}
    return {"model_type": "llama", "hidden_act": "silu", **sizes, **changes}


def shapes(layers: int, linears: dict[str, tuple[int, int]] = LINEARS) -> list[tuple[str, int, int]]:
    return [(f"model.layers.{i}.{name}", *shape) for i in range(layers) for name, shape in linears.items()]


def settings(recipe: str = "gguf:q4_k_m", **changes: Any) -> QuantConfig:
    return QuantConfig(format=recipe, **changes)


def types(plans: list[LayerPlan]) -> dict[str, str]:
    return {plan.name: str(plan.scheme) for plan in plans}


@pytest.mark.parametrize("usual", ["q4_k", "q5_k"])
def test_the_mixture_matches_llama_cpp(usual: str) -> None:
    """llama.cpp's rule for 32 layers: the first four, the last four, and every third layer between them."""
    generous = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    planned = types(recipes.plan_layers(shapes(32), settings(f"gguf:{usual}_m"), llama()))
    for layer in range(32):
        for name in LINEARS:
            more = layer in generous and name in ("self_attn.v_proj", "mlp.down_proj")
            assert planned[f"model.layers.{layer}.{name}"] == ("q6_k" if more else usual), (layer, name)


@pytest.mark.parametrize(
    ("recipe", "heads", "usual", "v", "down", "o"),
    [
        ("q2_k", 8, "q2_k", ["q3_k"] * 16, ["q3_k"] * 16, "q3_k"),
        ("q2_k", 2, "q2_k", ["q4_k"] * 16, ["q3_k"] * 16, "q3_k"),
        ("q3_k_s", 2, "q3_k", ["q3_k"] * 16, ["q3_k"] * 16, "q3_k"),
        ("q3_k_m", 8, "q3_k", ["q5_k"] * 2 + ["q4_k"] * 14, ["q5_k"] + ["q4_k"] * 15, "q4_k"),
        ("q3_k_l", 8, "q3_k", ["q5_k"] * 16, ["q5_k"] * 16, "q5_k"),
        ("q4_k_s", 8, "q4_k", ["q5_k"] * 4 + ["q4_k"] * 12, ["q5_k"] * 2 + ["q4_k"] * 14, "q4_k"),
        ("q8_0", 8, "q8_0", ["q8_0"] * 16, ["q8_0"] * 16, "q8_0"),
        ("iq4_xs", 2, "iq4_xs", ["q5_k"] * 16, ["iq4_xs"] * 16, "iq4_xs"),
        ("iq4_nl", 8, "iq4_nl", ["iq4_nl"] * 16, ["iq4_nl"] * 16, "iq4_nl"),
    ],
)  # fmt: skip
def test_mixtures_follow_llama_cpp(recipe: str, heads: int, usual: str, v: list[str], down: list[str], o: str) -> None:
    config = llama(16, num_key_value_heads=heads)
    planned = types(recipes.plan_layers(shapes(16), settings(f"gguf:{recipe}"), config))
    for layer in range(16):
        chosen = [planned[f"model.layers.{layer}.{name}"] for name in LINEARS]
        assert chosen == [usual, v[layer], o, usual, down[layer]], layer


def test_every_recipe_is_a_format() -> None:
    assert set(recipes.RECIPES) == set(GGUF_GRIDS)


def test_the_head_has_the_type_of_the_recipe() -> None:
    shapes = {"model.embed_tokens.weight": (2048, 512), "lm_head.weight": (2048, 512)}
    for recipe, expected in (("q8_0", ["q8_0", "q8_0"]), ("q2_k", ["q2_k", "q6_k"]), ("q3_k_m", ["q3_k", "q6_k"])):
        assert list(map(str, recipes.outside(shapes, settings(f"gguf:{recipe}"), llama()).values())) == expected


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k"])
def test_a_plain_recipe_has_one_type(kind: str) -> None:
    assert set(types(recipes.plan_layers(shapes(8), settings(f"gguf:{kind}"), llama(8))).values()) == {kind}


def test_a_fused_qkv_weight_has_the_role_of_v() -> None:
    linears = {"self_attn.qkv_proj": (768, 512), "mlp.gate_up_proj": (2048, 512)}
    planned = types(recipes.plan_layers(shapes(16, linears), settings(), llama(16, model_type="phi3")))
    fused = [planned[f"model.layers.{layer}.self_attn.qkv_proj"] for layer in range(16)]
    assert [layer for layer, kind in enumerate(fused) if kind == "q6_k"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {kind for name, kind in planned.items() if "gate_up" in name} == {"q4_k"} and set(fused) == {"q4_k", "q6_k"}


@pytest.mark.parametrize(
    ("columns", "recipe", "expected"),
    [
        (512, "gguf:q4_k", "q4_k"),
        (288, "gguf:q4_k", "q5_0"),
        (288, "gguf:q5_k", "q8_0"),
        (288, "gguf:q6_k", "q8_0"),
        (288, "gguf:q3_k_s", "q4_0"),
        (288, "gguf:q2_k", "q4_0"),
        (288, "gguf:iq4_xs", "iq4_nl"),
        (172, "gguf:q4_k", None),
    ],
)
def test_rows_without_whole_superblocks_get_finer_blocks(columns: int, recipe: str, expected: str | None) -> None:
    linears = {"self_attn.q_proj": (512, 512), "mlp.down_proj": (512, columns)}
    _, plan = recipes.plan_layers(shapes(1, linears), settings(recipe), llama(1))
    assert plan.scheme.weights == (None if expected is None else WeightScheme.of_blocks(expected))
    assert bool(plan.reason) == (columns != 512) and (expected is None) == plan.reason.startswith("kept in float")
    if plan.reason:
        with pytest.raises(ConfigError, match=str(columns)):
            recipes.plan_layers(shapes(1, linears), settings(recipe, strict=True), llama(1))


@pytest.mark.parametrize(
    ("type_", "nbytes"),
    [("q2_k", 84), ("q3_k", 110), ("q4_k", 144), ("q5_k", 176), ("q6_k", 210), ("q8_0", 8 * 34), ("iq4_xs", 136)],
)
def test_a_plan_computes_its_packed_bytes(type_: str, nbytes: int) -> None:
    plan = LayerPlan("q_proj", 3, 512, Scheme(WeightScheme.of_blocks(type_)))
    assert plan.packed_bytes(scale_bytes=2) == 3 * 2 * nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_packed_as_in_llama_cpp(tied: bool) -> None:
    outside = {"model.embed_tokens.weight": (2048, 512), "model.norm.weight": (512,), "lm_head.weight": (2048, 512)}
    if tied:
        del outside["lm_head.weight"]
    grids = recipes.outside(outside, settings(), llama(tie_word_embeddings=tied))
    expected = {"model.embed_tokens.weight": "q6_k"} if tied else {
        "model.embed_tokens.weight": "q4_k", "lm_head.weight": "q6_k"
    }  # fmt: skip
    assert {name: str(scheme) for name, scheme in grids.items()} == expected
    assert recipes.outside(outside, settings(skip=("embed_tokens", "lm_head")), llama()) == {}


def test_skipped_layers_are_kept_in_float() -> None:
    plans = recipes.plan_layers(shapes(2), settings(skip=("down_proj",)), llama(2))
    assert {plan.name for plan in plans if plan.scheme.weights is None} == {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    }
    with pytest.raises(ConfigError, match="nothing is left"):
        recipes.plan_layers(shapes(1), settings(skip=("*",)), llama(1))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"scheme": WeightScheme(8)}, "--bits"),
        ({"overrides": (Override(pattern="down_proj", bits=8),)}, "--override"),
        ({"target_bits": 4.5}, "--target-bits"),
        ({"scales": "minmax"}, "--scales minmax"),
    ],
)
def test_a_recipe_cannot_be_combined_with_other_grids(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        recipes.plan_layers(shapes(1), settings(**changes), llama(1))


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="another"):
        recipes.plan_layers(shapes(1), settings(), llama(model_type="another"))
