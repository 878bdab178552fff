"""Scales and zero points: min-max compared with numbers by hand, the search with a slow reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.numerics import affine_grid
from llmq.numerics.affine_grid import Grid
from llmq.numerics.scheme import BITS, WeightScheme
from llmq_kernels.grid_search import torch_path

FLOAT32 = torch.float32
EPSILON = 2.0**-23  # of float32
GROUPINGS = (16, 32, "channel", "tensor")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight: Tensor, fitted: Grid, importance: Tensor) -> Tensor:
    """(N,) float64: the error that the search lowers, of the nearest codes on the grid."""
    decoded = fitted.quantized(fitted.encode(weight)).dequantize().double()
    return ((decoded - weight.double()).square() * importance.double()).sum(1)


# ---- min-max


def test_a_symmetric_scale_follows_from_the_largest_weight() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 3], weight[0, 20], weight[1, 5] = -3.0, 0.75, 1.5
    fitted = affine_grid.fit_minmax(weight, WeightScheme(4, 16), FLOAT32)
    by_hand = torch.tensor(
        [[0.4, 0.1], [0.2, affine_grid.SMALLEST_SCALE_ELSEWHERE]]
    )  # 3 / 7.5, 0.75 / 7.5, 1.5 / 7.5, none
    torch.testing.assert_close(fitted.scales, by_hand, rtol=EPSILON, atol=0)
    assert fitted.zeros is None


def test_an_asymmetric_range_is_that_of_the_weights_and_zero() -> None:
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.0] * 4, [3.0, 1.0, 2.0, 1.5] * 4, [-6.0, -2.0, -3.0, -1.0] * 4])
    fitted = affine_grid.fit_minmax(weight, WeightScheme(4, 16, symmetric=False), FLOAT32)
    by_hand = torch.tensor([[3 / 15], [3 / 15], [6 / 15]])  # zero is always inside the range
    torch.testing.assert_close(fitted.scales, by_hand, rtol=EPSILON, atol=0)
    assert fitted.zeros is not None and fitted.zeros.dtype == torch.int16
    assert fitted.zeros.tolist() == [[5], [0], [15]]


def test_codes_are_the_nearest_values_of_the_grid() -> None:
    fitted = Grid(WeightScheme(4, 16), torch.tensor([[0.5]]), None)
    weight = torch.tensor([[-9.0, -4.0, -3.8, -3.7, -0.3, -0.2, 0.0, 0.2, 0.3, 1.0, 3.2, 3.3, 3.5, 3.7, 9.0, 99.0]])
    assert fitted.encode(weight).tolist() == [[0, 0, 0, 1, 7, 8, 8, 8, 9, 10, 14, 15, 15, 15, 15, 15]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_min_max_errors_are_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    """This includes a symmetric extreme on the side with one code less: it is half a step beyond the last code."""
    weight = weights(8, 64)
    fitted = affine_grid.fit_minmax(weight, WeightScheme(bits, 32, symmetric), FLOAT32)
    codes = fitted.encode(weight)
    scales, _ = fitted.by_column(64)
    steps = (fitted.quantized(codes).dequantize() - weight).abs() / scales
    # An asymmetric zero point is rounded, which moves the ends of the range by up to half a step.
    assert float(steps.max()) <= (0.5 if symmetric else 1.0) + 2**bits * EPSILON
    assert int(codes.min()) <= 1 and int(codes.max()) == 2**bits - 1


# ---- the search


def searched_by_hand(group: Tensor, costs: Tensor, scheme: WeightScheme) -> float:
    """The least error of one group (g,) over the documented candidates, one by one in float64."""
    w, c = group.double().numpy(), costs.double().numpy()
    if scheme.symmetric and w.max() > -w.min():
        w = -w  # a negative scale: the largest weight is on the side with one code more
    middle, levels = 2 ** (scheme.bits - 1), 2**scheme.bits - 1
    if scheme.symmetric:
        widest, zero = 2 * np.abs(w).max() / levels, middle
    else:
        widest = (max(w.max(), 0) - min(w.min(), 0)) / levels
        zero = int(np.round(-min(w.min(), 0) / widest))

    def error(scale: float, zero: int) -> float:
        codes = np.clip(np.round(w / scale + zero), 0, levels)
        return float((c * (scale * (codes - zero) - w) ** 2).sum())

    factors = np.linspace(0.25 if scheme.bits == 2 else 0.5, 1.08, 60)
    coarse = {widest: error(widest, zero), **{widest * f: error(widest * f, zero) for f in factors}}
    centre, step = min(coarse, key=lambda scale: coarse[scale]), factors[1] - factors[0]
    shifts = [0] if scheme.symmetric else [-2, -1, 0, 1, 2]
    fine = [
        error(centre + widest * offset, min(max(zero + shift, 0), levels))
        for offset in np.linspace(-step, step, 16)
        for shift in shifts
    ]
    return min(*coarse.values(), *fine)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [20, 47])  # some of their rows need a zero point two steps away
def test_the_search_is_as_good_as_trying_every_candidate(bits: int, symmetric: bool, seed: int) -> None:
    scheme = WeightScheme(bits, 16, symmetric)
    weight, importance = weights(12, 16, seed=seed) ** 3, weights(16, seed=seed + 500).square()
    errors = weighted_error(weight, affine_grid.fit_searched(weight, scheme, FLOAT32, importance), importance)
    expected = torch.tensor([searched_by_hand(row, importance, scheme) for row in weight])
    # A decoded weight of up to 2**bits half steps has a relative error of one epsilon.  Relative to a typical error of
    # a quarter of a step that is 2**(bits + 2) epsilons; twice that for the square, four times for two rounding steps.
    torch.testing.assert_close(errors, expected.double(), rtol=2 ** (bits + 5) * EPSILON, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_lowers_the_weighted_error(bits: int, grouping: int | str, symmetric: bool) -> None:
    scheme = WeightScheme(bits, grouping, symmetric)  # type: ignore[arg-type]
    weight, importance = weights(6, 96), weights(96, seed=1).square()
    searched, minmax = (
        affine_grid.fit_searched(weight, scheme, FLOAT32, importance),
        affine_grid.fit_minmax(weight, scheme, FLOAT32),
    )
    assert float(weighted_error(weight, searched, importance).sum()) < float(
        weighted_error(weight, minmax, importance).sum()
    )


def test_the_search_keeps_an_exact_min_max_grid() -> None:
    exact = torch.arange(16.0)[None] / 4  # 0 to 15 steps: min-max has no error at all
    fitted = affine_grid.fit_searched(exact, WeightScheme(4, 16, symmetric=False), FLOAT32)
    assert torch.equal(fitted.quantized(fitted.encode(exact)).dequantize(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_symmetric_grid_takes_the_sign_of_the_largest_weight(dtype: torch.dtype) -> None:
    """-8 … 7 steps: an extreme of eight steps fits on either side, by a scale of the right sign."""
    scheme, exact = WeightScheme(4, 16), torch.arange(-8.0, 8.0)[None] / 4
    for weight in (exact, -exact):
        fitted = affine_grid.fit_searched(weight, scheme, dtype)
        error = weighted_error(weight, fitted, torch.ones(16))
        assert float(error) < 0.01 * float(
            weighted_error(weight, affine_grid.fit_minmax(weight, scheme, dtype), torch.ones(16))
        )
        assert bool((fitted.scales > 0).all()) is bool(torch.equal(weight, exact))
    weight = weights(40, 64)
    plain, negated = (affine_grid.fit_searched(signed, scheme, dtype) for signed in (weight, -weight))
    assert torch.equal(plain.scales, -negated.scales)


def test_no_scale_is_smaller_than_engines_accept() -> None:
    scales = torch.tensor([[1e-7, -1e-7, 0.3, -0.3, 0.0]])
    stored = affine_grid.storable(scales, torch.float16).tolist()[0]
    assert stored == pytest.approx([6.2e-5, -6.2e-5, 0.3, -0.3, 6.2e-5], rel=1e-3)


def test_importance_decides_which_weights_are_exact() -> None:
    weight = torch.tensor([[*[0.1] * 15, -1.0]])
    high, low = torch.ones(16), torch.ones(16)
    high[15], low[15] = 1e4, 1e-4
    scheme = WeightScheme(2, 16)
    kept = affine_grid.fit_searched(weight, scheme, FLOAT32, high)
    clipped = affine_grid.fit_searched(weight, scheme, FLOAT32, low)
    assert abs(float(kept.quantized(kept.encode(weight)).dequantize()[0, 15]) + 1.0) < 0.01
    assert float(clipped.scales) < 0.6 * float(kept.scales)


def test_searching_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = weights(7, 64), WeightScheme(4, 32, symmetric=False)
    whole = affine_grid.fit_searched(weight, scheme, FLOAT32)
    monkeypatch.setattr(torch_path, "ELEMENTS_AT_ONCE", {"cpu": 128})  # two rows at a time, then the last one
    pieces = affine_grid.fit_searched(weight, scheme, FLOAT32)
    assert whole.zeros is not None and pieces.zeros is not None
    assert torch.equal(whole.scales, pieces.scales) and torch.equal(whole.zeros, pieces.zeros)


# ---- groups


@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
def test_a_channel_grid_is_one_group_per_row(fit: object) -> None:
    weight = weights(5, 48)
    fitted = fit(weight, WeightScheme(4, "channel"), FLOAT32)  # type: ignore[operator]
    assert fitted.scales.shape == (5, 1)
    for row in range(5):
        alone = fit(weight[row : row + 1], WeightScheme(4, "channel"), FLOAT32)  # type: ignore[operator]
        assert torch.equal(alone.scales[0], fitted.scales[row])


@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
def test_a_tensor_grid_is_one_scale_for_all_rows(fit: object) -> None:
    weight = weights(5, 48)
    fitted = fit(weight, WeightScheme(4, "tensor", symmetric=False), FLOAT32)  # type: ignore[operator]
    flat = fit(weight.reshape(1, -1), WeightScheme(4, "channel", symmetric=False), FLOAT32)  # type: ignore[operator]
    assert fitted.scales.shape == fitted.zeros.shape == (5, 1)
    assert fitted.scales.unique().tolist() == flat.scales.flatten().tolist()
    assert fitted.zeros.unique().tolist() == flat.zeros.flatten().tolist()


def test_importance_applies_to_every_row_of_a_tensor_grid() -> None:
    weight, importance = weights(4, 32), weights(32, seed=1).square()
    fitted = affine_grid.fit_searched(weight, WeightScheme(3, "tensor"), FLOAT32, importance)
    flat = affine_grid.fit_searched(weight.reshape(1, -1), WeightScheme(3, "channel"), FLOAT32, importance.repeat(4))
    assert fitted.scales.unique().tolist() == flat.scales.flatten().tolist()


# ---- scales and zero points that a file can hold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
def test_scales_come_in_the_dtype_of_the_file(fit: object, dtype: torch.dtype) -> None:
    assert fit(weights(4, 32), WeightScheme(4, 16), dtype).scales.dtype == dtype  # type: ignore[operator]


def test_the_search_compares_scales_as_the_file_rounds_them() -> None:
    """bfloat16 keeps 8 bits of a scale, so choosing in float32 and rounding afterwards gives a worse result."""
    weight, one = weights(64, 32), torch.ones(32)
    scheme = WeightScheme(8, 32)
    stored = affine_grid.fit_searched(weight, scheme, torch.bfloat16)
    exact = affine_grid.fit_searched(weight, scheme, FLOAT32)
    rounded = Grid(scheme, exact.scales.to(torch.bfloat16), None)
    assert float(weighted_error(weight, stored, one).sum()) < float(weighted_error(weight, rounded, one).sum())


@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_float16_scale_is_subnormal(fit: object, symmetric: bool) -> None:
    fitted = fit(weights(4, 32) * 1e-6, WeightScheme(4, 16, symmetric), torch.float16)  # type: ignore[operator]
    assert float(fitted.scales.abs().min()) >= 6.1e-5
    assert torch.equal(fitted.quantized(fitted.encode(torch.zeros(4, 32))).dequantize(), torch.zeros(4, 32))


@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_group_of_zeros_stays_zero(fit: object, symmetric: bool, dtype: torch.dtype) -> None:
    weight = weights(2, 32)
    weight[:, :16] = 0
    fitted = fit(weight, WeightScheme(4, 16, symmetric), dtype)  # type: ignore[operator]
    decoded = fitted.quantized(fitted.encode(weight)).dequantize()
    assert float(fitted.scales.abs().min()) > 0 and bool(fitted.scales.isfinite().all())
    assert torch.equal(decoded[:, :16], torch.zeros(2, 16))


@pytest.mark.parametrize("fit", [affine_grid.fit_minmax, affine_grid.fit_searched])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outlier", [1e3, -1e30])
def test_a_huge_outlier_affects_only_its_own_group(fit: object, symmetric: bool, outlier: float) -> None:
    """At 1e30 the scale is beyond the range of float16, so it becomes the largest float16 and not infinity."""
    weight = weights(1, 32)
    scheme = WeightScheme(4, 16, symmetric)
    calm = fit(weight, scheme, torch.float16)  # type: ignore[operator]
    weight[0, 3] = outlier
    fitted = fit(weight, scheme, torch.float16)  # type: ignore[operator]
    decoded = fitted.quantized(fitted.encode(weight)).dequantize()
    assert bool(fitted.scales.isfinite().all()) and bool(decoded.isfinite().all())
    assert float(fitted.scales[0, 1]) == float(calm.scales[0, 1])
    limit = 0.1 * abs(outlier) if abs(outlier) < 1e6 else abs(outlier)
    assert abs(float(decoded[0, 3]) - outlier) <= limit
