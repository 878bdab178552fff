"""`InputStats`: sums over tokens compared with NumPy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmq.numerics import input_stats
from llmq.numerics.block_diagonal import scaling
from llmq.numerics.input_stats import InputStats
from llmq_kernels.gram import op as gram

CPU = torch.device("cpu")
EPSILON = 2.0**-23  # of float32
MOMENTS = ("second_moment", "cross_moment", "drift_moment")


def inputs(T: int = 50, K: int = 8) -> Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(0)) + 0.5


def seen(*batches: Tensor) -> InputStats:
    running = InputStats(batches[0].shape[-1], CPU)
    for batch in batches:
        running.update(batch)
    return running


def test_moments_are_means_over_tokens() -> None:
    X = inputs().double().numpy()
    stats = seen(inputs())
    assert stats.tokens == 50
    # The error of a float32 sum of 50 products is at most 50 epsilons of the sum of their magnitudes.
    hessian, bound = X.T @ X / 50, np.abs(X).T @ np.abs(X) / 50 * 50 * EPSILON
    assert (np.abs(stats.second_moment().numpy() - hessian) <= bound).all()
    assert (np.abs(stats.mean_square.numpy() - np.diag(hessian)) <= np.diag(bound)).all()
    np.testing.assert_allclose(stats.mean_absolute.numpy(), np.abs(X).mean(0), rtol=50 * EPSILON)


def test_batches_and_leading_dimensions_add_up() -> None:
    X = inputs(48)
    whole, parts = seen(X), seen(X[:10], X[10:].reshape(2, 19, 8))
    assert parts.tokens == whole.tokens == 48
    torch.testing.assert_close(parts.second_moment(), whole.second_moment(), rtol=48 * EPSILON, atol=48 * EPSILON)
    torch.testing.assert_close(parts.mean_absolute, whole.mean_absolute, rtol=48 * EPSILON, atol=0)


def test_long_batches_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    X = inputs(50)
    whole = seen(X)
    monkeypatch.setattr(input_stats, "TOKENS_AT_ONCE", 7)
    parts = seen(X)
    assert parts.tokens == 50
    torch.testing.assert_close(parts.second_moment(), whole.second_moment(), rtol=50 * EPSILON, atol=50 * EPSILON)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_inputs_are_in_float32(dtype: torch.dtype) -> None:
    """4096 tokens of 10 add up to 409,600 for each product: beyond float16, and beyond the 8 bits of bfloat16."""
    stats = seen(torch.full((4096, 2), 10.0, dtype=dtype), torch.full((1, 2), 10.0, dtype=dtype))
    assert stats.second_moment().dtype == torch.float32
    assert stats.second_moment().tolist() == [[100.0, 100.0], [100.0, 100.0]]


def pairs(T: int = 50, K: int = 8) -> tuple[Tensor, Tensor]:
    """The inputs in the float model and in the quantized model, (T, K) each."""
    moved = inputs(T, K)
    return moved * 1.1 + 0.1 * torch.randn(T, K, generator=torch.Generator().manual_seed(1)), moved


@pytest.mark.parametrize("chunk", [16_384, 7])
def test_cross_and_drift_moments_match_explicit_products(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(input_stats, "TOKENS_AT_ONCE", chunk)
    original, moved = pairs()
    stats = InputStats(8, CPU)
    validation = stats.begin_validation()
    assert stats.cross_moment() is None and validation.drift_moment() is None
    for running in (stats, validation):
        running.update(moved[:20].reshape(2, 10, 8), original[:20].reshape(2, 10, 8))
        running.update(moved[20:], original[20:])
    D, X = (original - moved).double(), moved.double()
    for running in (stats, validation):
        assert running.cross_moment() is not None
        torch.testing.assert_close(running.cross_moment().double(), D.T @ X / 50, rtol=0, atol=1e-6)
    assert validation.drift_moment() is not None and stats.drift_moment() is None  # computed for validation only
    torch.testing.assert_close(validation.drift_moment().double(), D.T @ D / 50, rtol=0, atol=1e-7)
    assert torch.equal(validation.drift_moment(), validation.drift_moment().T)


def test_a_token_without_float_inputs_makes_moments_unknown() -> None:
    original, moved = pairs()
    stats = InputStats(8, CPU)
    validation = stats.begin_validation()
    for running in (stats, validation):
        running.update(moved, original)
        running.update(moved[:1])
        assert running.tokens == 51 and running.cross_moment() is None and running.drift_moment() is None


def test_validation_tokens_are_counted_separately() -> None:
    X = inputs(50)
    stats = InputStats(8, CPU)
    assert stats.validation is None
    stats.begin_validation().update(X[30:])
    stats.update(X[:30])
    assert torch.equal(stats.second_moment(), seen(X[:30]).second_moment())
    assert stats.validation is not None
    assert torch.equal(stats.validation.second_moment(), seen(X[30:]).second_moment())


def test_a_token_of_weight_three_counts_three_times() -> None:
    original, moved = pairs()
    weights = torch.arange(50) % 4
    weighted, repeated = InputStats(8, CPU), InputStats(8, CPU)
    for running in (weighted, repeated):
        running.judges = True
    weighted.update(moved[:30], original[:30], weights[:30])
    weighted.update(moved[30:], original[30:], weights[30:].float())
    repeated.update(moved.repeat_interleave(weights, 0), original.repeat_interleave(weights, 0))
    assert weighted.tokens == 50 and repeated.tokens == int(weights.sum())
    for moment in MOMENTS:
        torch.testing.assert_close(getattr(weighted, moment)(), getattr(repeated, moment)(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted.mean_square, repeated.mean_square, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted.mean_absolute, seen(moved).mean_absolute, rtol=50 * EPSILON, atol=0)


def test_weighted_tokens_in_half_precision_need_no_float32_product_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of the three sums are half-precision products; before, all of them were in float32."""
    counted = {"half": 0}

    def product(left: Tensor, right: Tensor) -> Tensor:
        counted["half"] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return left.float() @ right.float()

    monkeypatch.setattr(gram, "half_product", product)
    monkeypatch.setattr(gram, "multiplied_in", lambda dtype, on_cuda: dtype)
    original, moved = (tensor.bfloat16() for tensor in pairs())
    stats, gamma = InputStats(8, CPU), torch.rand(50, generator=torch.Generator().manual_seed(2)) + 0.5
    stats.judges = True
    with FlopCounterMode(display=False) as counter:
        stats.update(moved, original, gamma)
    assert counter.get_total_flops() == counted["half"] == 3 * 2 * 50 * 8 * 8
    X, D = moved.double(), (original.float() - moved.float()).bfloat16().double()
    weighted = gamma.double()[:, None] / gamma.double().sum()
    for moment, left, right in zip(MOMENTS, (X, D, D), (X, X, D), strict=True):
        bound = 2.0**-8 * (left.abs().T @ (right.abs() * weighted))
        computed = getattr(stats, moment)().double()
        assert bool(((computed - left.T @ (right * weighted)).abs() <= bound).all())
        assert moment == "cross_moment" or torch.equal(computed, computed.T)


def test_half_of_a_symmetric_sum_is_enough() -> None:
    """As on a GPU: the part below the diagonal is mirrored when a moment is read, also between updates."""
    X = inputs(48)
    whole, half = InputStats(8, CPU), InputStats(8, CPU)
    half._gram[torch.ones(8, 8).tril(-1).bool()] = float("nan")
    for batch in X.split(16):
        for running in (whole, half):
            running.update(batch)
        torch.testing.assert_close(half.second_moment(), whole.second_moment(), rtol=48 * EPSILON, atol=48 * EPSILON)
        assert torch.equal(half.second_moment(), half.second_moment().T)
    scales = torch.linspace(0.5, 2, 8)
    divided, expected = half.in_basis(scaling(scales)), whole.in_basis(scaling(scales))
    torch.testing.assert_close(divided.second_moment(), expected.second_moment(), rtol=50 * EPSILON, atol=200 * EPSILON)
    torch.testing.assert_close(half.mean_square, whole.mean_square, rtol=48 * EPSILON, atol=0)


def test_moments_of_no_tokens_are_zero() -> None:
    stats = InputStats(4, CPU)
    stats.update(torch.empty(0, 4))
    assert stats.tokens == 0
    assert not stats.second_moment().any() and not stats.mean_square.any() and not stats.mean_absolute.any()


def test_dividing_divides_all_moments() -> None:
    original, moved = pairs()
    scales = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 0.1, 7.0])
    before, after = InputStats(8, CPU), InputStats(8, CPU)
    for running, divisor in ((before, torch.ones(8)), (after, scales)):
        for half in (running, running.begin_validation()):
            half.update(moved / divisor, original / divisor, torch.arange(50))
    scaled = before.in_basis(scaling(scales))
    assert scaled.validation is not None and after.validation is not None
    for divided, expected in ((scaled, after), (scaled.validation, after.validation)):
        for moment in MOMENTS[:2] if divided is scaled else MOMENTS:
            torch.testing.assert_close(getattr(divided, moment)(), getattr(expected, moment)(), rtol=1e-4, atol=1e-4)


def test_dividing_statistics_equals_dividing_inputs() -> None:
    X, scales = inputs(), torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 0.1, 7.0])
    before = seen(X)
    divided, expected = before.in_basis(scaling(scales)), seen(X / scales)
    assert divided.tokens == 50
    # Each entry is rounded once more; the errors of sums that cancel are relative to the size of their terms.
    size = expected.mean_square.sqrt()
    assert bool(
        ((divided.second_moment() - expected.second_moment()).abs() <= 100 * EPSILON * size[:, None] * size).all()
    )
    torch.testing.assert_close(divided.mean_absolute, expected.mean_absolute, rtol=100 * EPSILON, atol=0)
    assert torch.equal(before.second_moment(), seen(X).second_moment())  # the original is not changed
