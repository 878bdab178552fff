"""Grids of floats: scales that the file can hold, searched, and no stage that makes a weight worse."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.algorithms import Options, descent, gptq, kl_tuning, refit, rtn
from llmq.algorithms.kl_tuning import Rates
from llmq.numerics import affine_grid, float_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor, stacked, where
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import encode
from llmq_kernels.value_tables import E2M1, E4M3

NVFP4, MXFP4 = WeightScheme.of_floats("nvfp4"), WeightScheme.of_floats("mxfp4")
BOTH = pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=str)


def weight(N: int = 12, K: int = 64, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=draw) * torch.rand(N, 1, generator=draw).exp()


def hessian(K: int = 64) -> torch.Tensor:
    x = torch.randn(4 * K, K, generator=torch.Generator().manual_seed(1)) @ torch.randn(K, K).tril()
    return x.T @ x / len(x) + torch.eye(K)


def loss(target: torch.Tensor, q: QuantizedTensor, H: torch.Tensor) -> torch.Tensor:
    difference = target - q.dequantize()
    return ((difference @ H) * difference).sum(1)


def on_grid(scheme: WeightScheme, w: torch.Tensor, *, searched: bool = True) -> QuantizedTensor:
    fit = affine_grid.fit_searched if searched else affine_grid.fit_minmax
    grid = fit(w, scheme, torch.bfloat16)
    return grid.quantized(grid.encode(w))


def test_codes_are_places_among_the_values() -> None:
    codes = torch.arange(15, dtype=torch.uint8)
    values = E2M1.values(codes)
    assert values.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(E2M1.nearest(values), codes)
    assert torch.equal(E2M1.places(values), codes.float())
    assert E2M1.places(torch.tensor([-9.0, 5.0, 9.0])).tolist() == [0.0, 13.5, 14.0]
    assert E2M1.distances(torch.tensor([0.2, 7.0, 13.5, 14.0])).tolist() == [2.0, 0.5, 2.0, 2.0]


def test_the_codes_of_fp8_are_all_finite_values() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[values.isfinite()].unique()
    assert torch.equal(E4M3.values(torch.arange(E4M3.largest + 1)), finite)
    assert E4M3.largest == WeightScheme.of_floats("fp8").levels == 252 and E4M3.top == 448


@given(seed=st.integers(0, 99), size=st.floats(-30, 30))
@BOTH
def test_scales_are_numbers_of_the_file(scheme: WeightScheme, seed: int, size: float) -> None:
    q = on_grid(scheme, weight(seed=seed) * 2.0**size)
    assert torch.equal(float_grid.storable(q.scales, scheme, q.shared), q.scales)
    if scheme.floats == "mxfp4":
        assert bool((torch.frexp(q.scales).mantissa == 0.5).all()) and q.global_scale is None
    else:
        assert q.global_scale is not None
        numbers = q.scales * q.global_scale
        assert torch.equal(numbers.to(torch.float8_e4m3fn).float(), numbers)
        assert 2.0**-6 <= float(numbers.min()) and float(numbers.max()) <= 448


@BOTH
def test_the_searched_scales_are_the_best_ones(scheme: WeightScheme) -> None:
    w = weight(4, 32)
    q, plain = on_grid(scheme, w), on_grid(scheme, w, searched=False)
    width = scheme.columns_per_group(32)

    def error(scales: torch.Tensor) -> torch.Tensor:
        restored = E2M1.values(encode(w, scales, E2M1)) * scales.repeat_interleave(width, 1)
        return (restored - w).square().reshape(4, -1, width).sum(2)

    if scheme.floats == "mxfp4":
        legal = [torch.tensor(2.0**e) for e in range(-8, 8)]
    else:
        legal = [torch.tensor(b, dtype=torch.uint8).view(torch.float8_e4m3fn).float() for b in range(8, 127)]
        legal = [number / q.shared for number in legal]
    every = torch.stack([error(number.expand(q.scales.shape).contiguous()) for number in legal])
    if scheme.floats == "mxfp4":  # not those that cut off more of the largest weight than rounding would
        largest = w.abs().amax(1, keepdim=True)
        every[torch.stack([largest / number > 7 for number in legal])] = float("inf")
    assert torch.equal(error(q.scales), every.amin(0))
    assert float(error(q.scales).sum()) < float(error(plain.scales).sum()) or scheme.floats == "mxfp4"


@given(weight=st.floats(2.0**-100, 2.0**100, width=32))
def test_the_largest_weight_of_a_group_is_between_3_5_and_7_in_mxfp4(weight: float) -> None:
    w = torch.full((1, 32), weight)
    assert 3.5 <= weight / float(on_grid(MXFP4, w, searched=False).scales) < 7


def test_a_weight_of_zeros_has_a_scale() -> None:
    for scheme in (NVFP4, MXFP4):
        q = on_grid(scheme, torch.zeros(2, 32))
        assert bool((q.scales > 0).all()) and not bool(q.dequantize().any())


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4, WeightScheme.of_floats("fp8")], ids=str)
def test_every_stage_lowers_the_output_error(scheme: WeightScheme) -> None:
    w, H, options = weight(), hessian(), Options(scale_dtype=torch.bfloat16)
    stats = InputStats(64, torch.device("cpu"))
    stats.update(torch.randn(512, 64, generator=torch.Generator().manual_seed(3)) @ torch.linalg.cholesky(H).T)
    H = stats.second_moment()
    nearest = rtn.round_weight(w, None, scheme, options).quantized
    solved = gptq.round_weight(w, stats, scheme, options).quantized
    assert float(loss(w, solved, H).sum()) < 0.8 * float(loss(w, nearest, H).sum())
    for refinement in (descent, refit):
        before = loss(w, nearest, H)
        refined = refinement.refine(w, nearest, H, options)
        after = loss(w, refined, H)
        assert bool((after <= before * 1.0001).all())
        assert float(after.sum()) < float(before.sum()) or (refinement is refit and scheme.floats == "mxfp4")
        if scheme.few_scales:
            assert torch.equal(float_grid.storable(refined.scales, scheme, refined.shared), refined.scales)
        assert refined.scales.dtype == nearest.scales.dtype


@BOTH
def test_tuning_moves_codes_and_scales_to_values_of_the_grid(scheme: WeightScheme) -> None:
    w, target = weight(), weight(seed=5)
    q = on_grid(scheme, w)
    rates = Rates(0.05, 0.02)
    state = kl_tuning.start(q, w, rates)
    assert torch.equal(kl_tuning.result(state).dequantize(), q.dequantize())
    before = float((q.dequantize() - target).square().sum())
    for step in range(30):
        kl_tuning.update(state, kl_tuning.result(state).dequantize() - target, rates, step)
    tuned = kl_tuning.result(state)
    assert float((tuned.dequantize() - target).square().sum()) < 0.5 * before
    assert torch.equal(float_grid.storable(tuned.scales, scheme, tuned.shared), tuned.scales)
    assert not torch.equal(tuned.scales, q.scales)


def test_rows_keep_the_global_scale() -> None:
    q = on_grid(NVFP4, weight())
    halves = [q.rows(0, 5), q.rows(5, 12)]
    for joined in (stacked(halves), where(torch.ones(12, 1, dtype=torch.bool), q, dataclasses.replace(q))):
        assert torch.equal(joined.dequantize(), q.dequantize())
        assert joined.global_scale is not None and joined.global_scale.shape == (12, 1)


def test_fused_weights_share_a_global_scale() -> None:
    small, large = weight(), 40 * weight(seed=2)
    options = Options(global_scale=float_grid.global_scale([small, large]))
    q, k = (rtn.round_weight(w, None, NVFP4, options.on(NVFP4)).quantized for w in (small, large))
    assert q.global_scale is not None and k.global_scale is not None
    assert torch.equal(q.global_scale, k.global_scale)


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-30, 1e30])
def test_weights_of_any_size_have_a_global_scale(size: float) -> None:
    q = on_grid(NVFP4, weight() * size)
    assert q.global_scale is not None and bool(q.global_scale.isfinite().all())
    assert torch.equal(float_grid.storable(q.scales, NVFP4, q.shared), q.scales)
    if size > 1e-40:
        error = (q.dequantize() - weight() * size).double().norm() / (weight() * size).double().norm()
        assert float(error) < 0.15
