"""Refitted scales compared with a dense least-squares solver on an explicit design matrix."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, output_error, refit
from llmq.algorithms.ridge import RIDGE
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

K, N, GROUP = 64, 6, 16
G = K // GROUP


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(width: int) -> Tensor:
    X = random(4 * width, width, seed=1) @ random(width, width, seed=2) / 8
    return X.T @ X / len(X) + 0.01 * torch.eye(width)


def nearest(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    chosen = affine_grid.fit_minmax(weight, scheme, dtype)
    return chosen.quantized(chosen.encode(weight))


def by_least_squares(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """(N, G) float64.  H = LLᵀ, so a row's loss is ‖Lᵀ(w - Bᵀs)‖²; the ridge adds one row √(μ D_g) per group."""
    L = torch.linalg.cholesky(hessian.double())
    steps = quantized.codes.double() - (
        quantized.scheme.middle if quantized.zeros is None else quantized.zeros.double()[:, quantized.column_groups()]
    )
    fitted = []
    for n in range(len(weight)):
        design = torch.zeros(K, G, dtype=torch.float64)
        for k in range(K):
            design[k, k // GROUP] = steps[n, k]
        left = L.T @ design
        roots = (RIDGE * left.square().sum(0)).sqrt()
        right = torch.cat([L.T @ weight[n].double(), roots * quantized.scales[n].double()])
        fitted.append(torch.linalg.lstsq(torch.cat([left, torch.diag(roots)]), right).solution)
    return torch.stack(fitted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_a_dense_solver(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "ELEMENTS_AT_ONCE", 4 * K)  # four rows at once, then the last two
    weight, hessian = random(N, K), hessian_of(K)
    start = nearest(weight, WeightScheme(3, GROUP, symmetric))
    refitted = refit.refine(weight, start, hessian, Options(torch.float32))
    torch.testing.assert_close(refitted.scales.double(), by_least_squares(weight, start, hessian), rtol=1e-4, atol=0)
    assert torch.equal(refitted.codes, start.codes)
    loss, before = (output_error(weight, tensor.dequantize(), hessian) for tensor in (refitted, start))
    assert bool((loss < before).all())


def test_a_row_is_accepted_only_where_its_loss_falls() -> None:
    """bfloat16 scales have eight bits: scales that are already optimal change only by rounding errors."""
    weight, hessian = random(40, K), hessian_of(K)
    start = nearest(weight, WeightScheme(3, GROUP), torch.bfloat16)
    once = refit.refine(weight, start, hessian, Options(torch.bfloat16))
    twice = refit.refine(weight, once, hessian, Options(torch.bfloat16))
    losses = [output_error(weight, tensor.dequantize(), hessian) for tensor in (start, once, twice)]
    assert bool((losses[1] <= losses[0]).all()) and bool((losses[2] <= losses[1]).all())
    kept = (twice.scales == once.scales).all(1)
    assert bool(kept.any()) and once.scales.dtype == torch.bfloat16
    rounded = by_least_squares(weight, once, hessian).bfloat16()
    refused = dataclasses.replace(once, scales=rounded)
    worse = output_error(weight, refused.dequantize(), hessian) > losses[1] * (1 + 1e-6)
    assert bool(worse.any()) and torch.equal(twice.scales[worse], once.scales[worse])


def test_zero_groups_keep_their_scale_and_scales_fit_the_file() -> None:
    weight, hessian = random(N, K) * 1e-3, hessian_of(K)
    start = nearest(weight, WeightScheme(4, GROUP), torch.float16)
    start.codes[:, :GROUP] = start.scheme.middle
    refitted = refit.refine(weight, start, hessian, Options(torch.float16))
    assert torch.equal(refitted.scales[:, 0], start.scales[:, 0])
    assert not torch.equal(refitted.scales[:, 1:], start.scales[:, 1:])
    assert float(refitted.scales.min()) >= 6.1e-5


def test_a_scale_keeps_its_sign_and_stays_finite() -> None:
    weight, hessian = random(N, K), hessian_of(K)
    start = nearest(weight, WeightScheme(4, GROUP))
    turned = refit.refine(-weight, dataclasses.replace(start, scales=-start.scales), hessian, Options(torch.float32))
    straight = refit.refine(weight, start, hessian, Options(torch.float32))
    assert torch.equal(turned.scales, -straight.scales) and bool((straight.scales > 0).all())
    against = refit.refine(-weight, start, hessian, Options(torch.float32))
    assert bool((against.scales > 0).all())
    nowhere = refit.refine(torch.full_like(weight, math.nan), start, hessian, Options(torch.float32))
    assert torch.equal(nowhere.scales, start.scales)


@pytest.mark.parametrize(("group_size", "changes"), [("channel", True), ("tensor", False)])
def test_a_scale_for_all_rows_is_not_refitted(group_size: str, changes: bool) -> None:
    weight, hessian = random(N, K), hessian_of(K)
    start = nearest(weight, WeightScheme(3, group_size))  # type: ignore[arg-type]
    refitted = refit.refine(weight, start, hessian, Options(torch.float32))
    assert torch.equal(refitted.scales, start.scales) is not changes
