"""The grid of each layer, especially where the requested group size does not divide its input size."""

import pytest

from llmq import formats
from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import GroupSize, Scheme, WeightScheme
from llmq.steps.layer_plans import plan_layers

COMPRESSED, GPTQ, AWQ = (formats.load(name) for name in ("compressed-tensors", "gptq", "awq"))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def plan(in_features: int, config: QuantConfig) -> LayerPlan:
    [layer_plan] = plan_layers([(DOWN, 64, in_features)], config, COMPRESSED)
    return layer_plan


@pytest.mark.parametrize(
    ("in_features", "asked", "given"),
    [
        (4096, 128, 128),
        (172, 128, "channel"),  # 4 * 43
        (352, 128, 32),
        (2880, 128, 64),
        (2880, 32, 32),
        (11008, 1024, 256),
        (64, 128, 64),
        (16, 1024, 16),
        (8, 16, "channel"),
        (172, "channel", "channel"),
        (172, "tensor", "tensor"),
    ],
)
def test_group_size_falls_back_to_a_divisor_or_one_scale_per_row(
    in_features: int, asked: GroupSize, given: GroupSize
) -> None:
    layer_plan = plan(in_features, QuantConfig(scheme=WeightScheme(4, asked, symmetric=False)))
    assert layer_plan.scheme.weights == WeightScheme(4, given, symmetric=False)
    if asked == given:
        assert layer_plan.reason == ""
    else:
        assert layer_plan.reason.startswith(f"{given} instead of {asked}: ")
        assert f"{asked} does not divide {in_features}" in layer_plan.reason


def test_a_layer_that_fits_no_grid_is_kept_in_float() -> None:
    """gptq packs 8 codes of 4 bits along in_features: 172 is not a multiple, so one scale per row does not help."""
    fits, odd = plan_layers([(Q, 64, 256), (DOWN, 64, 172)], QuantConfig(), GPTQ)
    assert fits.scheme.weights == WeightScheme()
    assert odd.scheme.weights is None
    assert odd.reason.startswith("kept in float: ") and "172" in odd.reason


def test_strict_raises_an_error_instead_of_a_fallback() -> None:
    strict = QuantConfig(strict=True)
    with pytest.raises(ConfigError, match=rf"{DOWN} \(64 x 352\): 32 instead of 128") as caught:
        plan(352, strict)
    assert "--strict" in caught.value.hint
    with pytest.raises(ConfigError, match=rf"{DOWN} \(64 x 172\): kept in float"):
        plan_layers([(Q, 64, 256), (DOWN, 64, 172)], strict, GPTQ)
    assert plan(256, strict).scheme.weights == WeightScheme()  # a grid that fits raises no error


def test_a_grid_that_the_format_cannot_hold_is_an_error() -> None:
    with pytest.raises(ConfigError, match=rf"awq cannot hold int8 g128 symmetric, the scheme of {DOWN}: .* 4 bits"):
        plan_layers([(DOWN, 64, 256)], QuantConfig(scheme=WeightScheme(8)), AWQ)
    with pytest.raises(ConfigError, match="gptq cannot hold int3 g64"):
        plan_layers([(Q, 64, 256)], QuantConfig(overrides=(Override(pattern="q_proj", bits=3, group_size=64),)), GPTQ)


def test_overrides_and_skips_apply_to_the_layers_they_name() -> None:
    config = QuantConfig(overrides=(Override(pattern="down_proj", bits=8, group_size=32),), skip=("k_proj",))
    shapes = [(Q, 64, 256), ("model.layers.0.self_attn.k_proj", 64, 256), (DOWN, 64, 256)]
    first, skipped, other = plan_layers(shapes, config, COMPRESSED)
    assert first == LayerPlan(Q, 64, 256, Scheme(WeightScheme()))
    assert skipped.scheme.weights is None and skipped.reason == "skipped on request"
    assert other.scheme.weights == WeightScheme(8, 32)


@pytest.mark.parametrize(
    ("shapes", "config", "why"),
    [
        ([(DOWN, 64, 256)], QuantConfig(skip=("*",)), "skipped on request"),
        ([(DOWN, 64, 172)], QuantConfig(), "172"),
        ([], QuantConfig(), "no linear layer in any block"),
    ],
    ids=["all skipped", "none fits", "none there"],
)
def test_nothing_left_to_quantize_is_an_error(
    shapes: list[tuple[str, int, int]], config: QuantConfig, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"no layer can be quantized: .*{why}") as caught:
        plan_layers(shapes, config, GPTQ)
    assert "--skip" in caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (WeightScheme(4, 32), 64 * 256 // 2 + 64 * 8 * 2),  # codes and float16 scales
        (WeightScheme(4, 32, symmetric=False), 64 * 256 // 2 + 64 * 8 * 2 + 64 * 8 // 2),  # and zeros of 4 bits
        (WeightScheme(3, "channel"), 64 * 256 * 3 // 8 + 64 * 2),
        (WeightScheme(8, "tensor"), 64 * 256 + 64 * 2),  # stored as one scale per row
    ],
    ids=str,
)
def test_the_packed_size_counts_codes_scales_and_zeros(scheme: WeightScheme, expected: int) -> None:
    layer_plan = LayerPlan(DOWN, 64, 256, Scheme(scheme))
    assert layer_plan.weights == 64 * 256
    assert layer_plan.packed_bytes(scale_bytes=2) == expected


def test_the_packed_size_counts_one_scale_per_block_of_fp8() -> None:
    layer_plan = LayerPlan(DOWN, 256, 256, Scheme(WeightScheme.of_floats("fp8-block")))
    assert layer_plan.packed_bytes(scale_bytes=2) == 256 * 256 + 4 * 2
