"""For random weights: values of a grid are quantized to themselves, and a search is never worse than min-max."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.numerics import affine_grid
from llmq.numerics.scheme import BITS, WeightScheme

EPSILON = 2.0**-23  # of float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
quick = settings(max_examples=40)

schemes = st.builds(WeightScheme, st.sampled_from(BITS), st.sampled_from((16, 32, "channel", "tensor")), st.booleans())


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(N, 32) float32: random, with outliers, with few different values, positive, or all zero."""
    rows = draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weight = torch.randn(rows, 32, generator=random) * 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(("plain", "outliers", "coarse", "positive", "zeros")))
    if kind == "outliers":
        weight *= 10.0 ** torch.randint(-3, 3, weight.shape, generator=random)
    elif kind == "coarse":
        weight = torch.randint(-1, 2, weight.shape, generator=random).float()
    elif kind == "positive":
        weight = weight.abs()
    elif kind == "zeros":
        weight = torch.zeros_like(weight)
    return weight


@quick
@given(weights(), schemes, st.sampled_from(DTYPES), st.booleans())
def test_values_of_the_grid_are_quantized_to_themselves(
    weight: Tensor, scheme: WeightScheme, dtype: torch.dtype, searched: bool
) -> None:
    fitted = (affine_grid.fit_searched if searched else affine_grid.fit_minmax)(weight, scheme, dtype)
    codes = fitted.encode(weight)
    assert torch.equal(fitted.encode(fitted.quantized(codes).dequantize()), codes)


@quick
@given(weights(), schemes, st.sampled_from(DTYPES), st.booleans())
def test_scales_and_zeros_fit_the_file(
    weight: Tensor, scheme: WeightScheme, dtype: torch.dtype, searched: bool
) -> None:
    fitted = (affine_grid.fit_searched if searched else affine_grid.fit_minmax)(weight, scheme, dtype)
    assert fitted.scales.dtype == dtype
    assert bool(fitted.scales.isfinite().all()) and float(fitted.scales.abs().min()) > 0
    assert (fitted.zeros is None) == scheme.symmetric
    if fitted.zeros is not None:
        assert 0 <= int(fitted.zeros.min()) and int(fitted.zeros.max()) <= scheme.levels


@quick
@given(weights(), schemes, st.sampled_from(DTYPES), st.integers(0, 1 << 30), st.sampled_from((0.0, 1.0, 3.0)))
def test_a_search_is_never_worse_than_min_max(
    weight: Tensor, scheme: WeightScheme, dtype: torch.dtype, seed: int, spread: float
) -> None:
    """Min-max is a candidate, so only rounding errors in the sum of the errors can make a difference.

    A decoded weight has a relative error of one epsilon, which changes a squared error e² by 2 |w| e epsilons.  By
    Cauchy-Schwarz the weighted sum of that is below 2 epsilons times sqrt(sum c w² · sum c e²).  The sum itself adds an
    epsilon for each of its terms.
    """
    importance = torch.exp(spread * torch.randn(32, generator=torch.Generator().manual_seed(seed)))
    errors = []
    for fitted in (
        affine_grid.fit_searched(weight, scheme, dtype, importance),
        affine_grid.fit_minmax(weight, scheme, dtype),
    ):
        decoded = fitted.quantized(fitted.encode(weight)).dequantize().double()
        errors.append(float(((decoded - weight.double()).square() * importance.double()).sum()))
    size = float((weight.double().square() * importance.double()).sum())
    slack = weight.numel() * EPSILON * errors[1] + 8 * EPSILON * (size * errors[1]) ** 0.5 + EPSILON**2 * size
    assert errors[0] <= errors[1] + slack


@pytest.mark.parametrize("scheme", [WeightScheme(2, 16), WeightScheme(8, 16, symmetric=False)], ids=str)
def test_min_max_is_kept_where_it_is_best(scheme: WeightScheme) -> None:
    """Weights on their own min-max grid, which no factor of the search gives exactly."""
    codes = torch.arange(16)[None] * scheme.levels // 15
    weight = (codes - (scheme.levels / 2 if scheme.symmetric else 0)).float() / 3
    minmax = affine_grid.fit_minmax(weight, scheme, torch.float32)
    searched = affine_grid.fit_searched(weight, scheme, torch.float32)
    if not scheme.symmetric:  # no error at all
        assert torch.equal(searched.scales, minmax.scales)
    decoded = [g.quantized(g.encode(weight)).dequantize() for g in (searched, minmax)]
    assert float((decoded[0] - weight).square().sum()) <= float((decoded[1] - weight).square().sum())
