"""From measurements to the settings of a run: the grid of each layer, and the possible targets."""

import pytest
import torch

from llmq import formats
from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError
from llmq.mixed_precision import assign
from llmq.numerics.scheme import WeightScheme
from llmq.report.sensitivity import Effect, Sensitivity, Unit
from llmq.setting_fields import config_to

SHAPES = {f"x.{name}": (name, 256, 256) for name in ("a.q", "a.k", "b.down")}
STORED = dict.fromkeys(SHAPES, 16 * 256 * 256)
LAYOUT = formats.load("compressed-tensors")
SCHEMES = assign.schemes_to_try(QuantConfig(), LAYOUT)


def layers(settings: QuantConfig | None = None) -> dict[str, assign.Layer]:
    return assign.candidates(SHAPES, STORED, SCHEMES, settings or QuantConfig(), LAYOUT, torch.bfloat16)


def sensitivity_of(losses: dict[str, tuple[float, float, float]]) -> Sensitivity:
    """A measurement; q and k are one unit; `losses` per unit for 4 bits in groups of 128, of 32, and for 8 bits."""
    grids = tuple(map(str, SCHEMES))
    units = []
    for names in (("a.q", "a.k"), ("b.down",)):
        ways = [layers()[f"x.{name}"].candidates for name in names]
        effects = tuple(
            Effect(grid, tuple(way[i].scheme for way in ways), sum(way[i].bits for way in ways), 1.0, loss, True)
            for i, (grid, loss) in enumerate(zip(grids, losses[names[0]], strict=True))
        )
        units.append(Unit("b", names, 65536 * len(names), 16 * 65536 * len(names), effects))
    return Sensitivity(grids, tuple(units), 1, 1)


MEASURED = sensitivity_of({"a.q": (0.3, 0.29, 0.01), "b.down": (0.5, 0.1, 0.02)})


def test_bits_equal_the_size_of_the_file() -> None:
    shape = 128  # the two numbers of the shape, in bits
    bits = [(way.bits - shape) / 65536 for way in layers()["x.a.q"].candidates]
    assert bits == [4 + 16 / 128, 4 + 16 / 32, 8 + 16 / 128]


def test_grid_of_the_run_is_a_candidate() -> None:
    own = WeightScheme(3, 64, False)
    assert assign.schemes_to_try(QuantConfig(scheme=own), LAYOUT)[-1] == own
    assert len(assign.schemes_to_try(QuantConfig(scheme=WeightScheme(4, 32)), LAYOUT)) == len(assign.GRIDS)


@pytest.mark.parametrize(
    ("preset", "tried"),
    [("w8a8", {"int4 g128", "int4 g32", "int8 channel"}), ("w4a8", {"int4 g128", "int4 g32", "int8 channel"}),
     ("fp8", {"int4 g128", "fp8"})],
)  # fmt: skip
def test_quantized_inputs_leave_the_grids_with_a_product(preset: str, tried: set[str]) -> None:
    settings = QuantConfig(preset=preset, target_bits=8)
    schemes = assign.schemes_to_try(settings, LAYOUT)
    assert {str(scheme).removesuffix(" symmetric") for scheme in schemes} == tried
    assert assign.candidates(SHAPES, STORED, schemes, settings, LAYOUT, torch.bfloat16)


@pytest.mark.parametrize("target", [4.127, 4.25, 4.3, 4.51, 5.5, 6.8, 8.13, 11.0, 16.0])
def test_plan_keeps_to_its_target(target: float) -> None:
    plan = assign.spend(MEASURED, target)
    assert plan.bits <= target
    assert plan.kl == min(
        a.kl + b.kl
        for a in (*MEASURED.units[0].effects, Effect("", (), MEASURED.units[0].float_bits, 0, 0, True))
        for b in (*MEASURED.units[1].effects, Effect("", (), MEASURED.units[1].float_bits, 0, 0, True))
        if a.bits + b.bits <= target * 3 * 65536
    )


def test_settings_contain_the_plan() -> None:
    settings = QuantConfig(skip=("head",), target_bits=5.5)
    plan = assign.spend(MEASURED, 5.5)
    assert plan.grids == ("int4 g128 symmetric", "int8 g128 symmetric")
    made = assign.settled(settings, plan)
    assert made == settings.replace(overrides=(Override(pattern="b.down", bits=8, group_size=128),), target_bits=None)
    assert made.scheme_for("a.k") == WeightScheme(4, 128) and made.scheme_for("b.down") == WeightScheme(8, 128)


def test_float_layers_are_skipped() -> None:
    plan = assign.spend(MEASURED, 16)
    assert assign.settled(QuantConfig(), plan).skip == ("a.q", "a.k", "b.down")
    assert "3 layers float" in str(plan)


def test_overridden_layer_is_left_out() -> None:
    assert list(layers(QuantConfig(skip=("down",), overrides=(Override(pattern="a.k", bits=8),)))) == ["x.a.q"]
    with pytest.raises(ConfigError, match="no layer is left"):
        layers(QuantConfig(skip=("*",)))


def test_too_few_bits_are_refused_before_measuring() -> None:
    with pytest.raises(ConfigError, match=r"the smallest grids take 4\.127") as caught:
        assign._require_reachable(layers().values(), 4.1)
    assert "4.13" in caught.value.hint


def test_target_is_saved_and_checked() -> None:
    assert QuantConfig.model_validate(config_to(QuantConfig(target_bits=4.5))).target_bits == 4.5
    assert "target_bits" not in config_to(QuantConfig())
    with pytest.raises(ConfigError, match="expected bits per weight"):
        QuantConfig(target_bits=0.5)
