"""Grids that weights already lie on are recovered, bit for bit, and float weights never seem to lie on one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.numerics.existing_grid import ExistingGrid, identify
from llmq.numerics.keep_grid import keep
from llmq.numerics.scheme import WeightScheme

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BRAIN, SINGLE)
quick = settings(max_examples=30)
N, K = 32, 256


def on_grid(group: int, bits: int, kind: str, scales: torch.dtype, stored: torch.dtype, seed: int = 0) -> Tensor:
    """(N, K) float32 with values of `stored`: weights on a grid, as a dequantized checkpoint has them."""
    random = torch.Generator().manual_seed(seed)
    rows, levels = N * K // group, 2**bits - 1
    x = torch.randn(rows, group, generator=random)
    x /= x.abs().amax(1, keepdim=True)  # -1 … 1, and one of them is reached
    s = (torch.rand(rows, 1, generator=random) * 0.02 + 0.003).to(scales).float()
    if kind == "symmetric":
        w = s * (x * 2 ** (bits - 1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    elif kind == "asymmetric":
        w = s * (((x + 1) / 2 * levels).round() - torch.randint(0, levels + 1, (rows, 1), generator=random))
    else:
        m = (-s * levels / 2 + 0.01 * torch.randn(rows, 1, generator=random)).to(scales).float()
        w = s * ((x + 1) / 2 * levels).round() + m
    return w.to(stored).float().reshape(N, K)


def assert_exact(weight: Tensor, stored: torch.dtype, scheme: WeightScheme, values: torch.dtype) -> None:
    kept = keep(weight, stored, scheme, values)
    assert kept is not None and kept.exact
    assert torch.equal(kept.quantized.dequantize().to(stored).float(), weight)


@pytest.mark.parametrize("group", [16, 32, 64, 128, "channel"])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("scales", [HALF, BRAIN])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_grid_is_identified_and_kept_bit_for_bit(group: Any, kind: str, scales: Any, stored: torch.dtype) -> None:
    weight = on_grid(K if group == "channel" else group, 4, kind, scales, stored)
    assert identify(weight, stored) == ExistingGrid(4, group, kind)  # type: ignore[arg-type]
    assert_exact(weight, stored, WeightScheme(4, group, kind == "symmetric"), scales)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("stored", DTYPES)
def test_other_bits(bits: int, stored: torch.dtype) -> None:
    weight = on_grid(32, bits, "symmetric", HALF, stored)
    assert str(identify(weight, stored)) == f"{bits}-bit grid of 32"
    assert_exact(weight, stored, WeightScheme(bits, 32), HALF)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_real_offsets_are_kept_in_q4_1(bits: int, stored: torch.dtype) -> None:
    weight = on_grid(32, bits, "offsets", HALF, stored)
    assert str(identify(weight, stored)) == f"{bits}-bit grid of 32 with offsets"
    assert_exact(weight, stored, WeightScheme.of_blocks("q4_1"), HALF)
    assert keep(weight, stored, WeightScheme(4, 32, False), HALF) is None


def test_the_scales_of_before_are_recovered() -> None:
    weight = on_grid(64, 4, "symmetric", BRAIN, BRAIN)
    kept = keep(weight, BRAIN, WeightScheme(4, 64), BRAIN)
    again = keep(kept.quantized.dequantize().to(HALF).float(), HALF, WeightScheme(4, 64), BRAIN) if kept else None
    assert kept is not None and again is not None
    assert torch.equal(kept.quantized.scales, again.quantized.scales)


def test_smaller_groups_and_more_levels_hold_the_grid() -> None:
    weight = on_grid(64, 4, "symmetric", HALF, BRAIN)
    for scheme in (WeightScheme(4, 32), WeightScheme(4, 16, False), WeightScheme(8, 64)):
        assert_exact(weight, BRAIN, scheme, HALF)
    assert_exact(weight, BRAIN, WeightScheme.of_blocks("q4_0"), HALF)


def test_what_a_scheme_cannot_hold() -> None:
    weight = on_grid(32, 4, "asymmetric", HALF, BRAIN)
    for scheme in (
        WeightScheme(4, 32),
        WeightScheme(4, 64, False),
        WeightScheme(3, 32, False),
        WeightScheme(4, "tensor"),
    ):
        assert keep(weight, BRAIN, scheme, HALF) is None
    assert_exact(weight, BRAIN, WeightScheme(8, 32), HALF)


def test_where_the_file_has_coarser_scales_the_codes_are_kept() -> None:
    weight = on_grid(32, 4, "symmetric", HALF, BRAIN)
    exact, kept = (keep(weight, BRAIN, WeightScheme(4, 32), values) for values in (HALF, BRAIN))
    assert exact is not None and kept is not None and not kept.exact
    assert torch.equal(exact.quantized.dequantize().sign(), kept.quantized.dequantize().sign())
    error = (kept.quantized.dequantize() - weight).abs() / weight.abs().clamp_min(1e-9)
    assert float(error.max()) < 2.0**-7  # half a step of bfloat16 for the scale, and half a step for the weight


def test_one_float_row_is_enough_to_refuse() -> None:
    weight = on_grid(32, 4, "symmetric", HALF, BRAIN)
    weight[7] = torch.randn(K, generator=torch.Generator().manual_seed(1)).mul(0.05).to(BRAIN).float()
    assert keep(weight, BRAIN, WeightScheme(4, 32), HALF) is None
    grid = identify(weight, BRAIN)
    assert grid is not None and 0.8 < grid.share < 1


def test_zero_and_constant_groups_in_a_grid_are_kept() -> None:
    for kind, scheme in (("symmetric", WeightScheme(4, 32)), ("offsets", WeightScheme.of_blocks("q4_1"))):
        weight = on_grid(32, 4, kind, HALF, BRAIN)
        weight[3, :64], weight[5, 32:96] = 0, 0.25
        assert_exact(weight, BRAIN, scheme, HALF)


def test_ternary_weights_are_a_grid_of_two_bits() -> None:
    weight = torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(0)).float() * 0.0171
    weight = weight.to(BRAIN).float()
    assert str(identify(weight, BRAIN)) == "2-bit grid with one scale per row"
    assert_exact(weight, BRAIN, WeightScheme(2, "channel"), BRAIN)


@st.composite
def floats(draw: st.DrawFn) -> tuple[Tensor, torch.dtype]:
    """Weights that were never quantized, also few, coarse, pruned, or partly constant ones."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    shape = (draw(st.sampled_from((1, 2, 24))), draw(st.sampled_from((16, 32, 128))))
    normal = torch.randn(shape, generator=random)
    kind = draw(st.sampled_from(("normal", "laplace", "heavy", "pruned", "constant", "zeros", "rows")))
    if kind == "laplace":
        normal = normal.sign() * torch.empty(shape).exponential_(generator=random)
    elif kind == "heavy":
        normal /= torch.randn(shape, generator=random).abs().clamp_min(1e-3)
    elif kind == "pruned":
        normal *= torch.rand(shape, generator=random) < 0.5
    elif kind in ("constant", "zeros"):
        normal = torch.full(shape, 0.0 if kind == "zeros" else float(normal[0, 0]))
    elif kind == "rows":
        normal = normal[:, :1].expand(shape).contiguous()
    stored = draw(st.sampled_from(DTYPES))
    return (normal * 10.0 ** draw(st.integers(-3, 1))).to(stored).float(), stored


@quick
@given(floats(), st.sampled_from((2, 4, 8)), st.sampled_from((16, "channel")), st.booleans(), st.sampled_from(DTYPES))
def test_float_weights_are_never_on_a_grid(
    given_: tuple[Tensor, torch.dtype], bits: int, group: Any, symmetric: bool, values: torch.dtype
) -> None:
    weight, stored = given_
    assert identify(weight, stored) is None
    assert keep(weight, stored, WeightScheme(bits, group, symmetric), values) is None
    if weight.shape[1] % 32 == 0:
        assert keep(weight, stored, WeightScheme.of_blocks("q4_1"), HALF) is None


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_float_weights_with_few_digits_are_not_on_a_grid_of_4_bits(digits: int) -> None:
    mantissa, exponent = torch.frexp(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
    weight = torch.ldexp((mantissa * 2**digits).round() / 2**digits, exponent)
    assert keep(weight, BRAIN, WeightScheme(4, 32), BRAIN) is None
    grid = identify(weight, BRAIN)
    assert grid is None or grid.bits > 4
