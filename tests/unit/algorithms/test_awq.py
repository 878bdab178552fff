"""AWQ: the exponent with the lowest loss, compared with a plain scan."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, awq, clip
from llmq.numerics.block_diagonal import scaling
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme

K = 64
FREE = torch.arange(K)  # every column has a separate channel
EPSILON = 2.0**-23  # of float32


def layer(outliers: int = 3, gain: float = 30.0, seed: int = 0) -> tuple[Tensor, Tensor, InputStats]:
    """A weight (N, K), inputs (T, K) with a few outlier channels, and their statistics."""
    draw = torch.Generator().manual_seed(seed)
    weight, X = torch.randn(16, K, generator=draw), torch.randn(200, K, generator=draw)
    X[:, torch.randperm(K, generator=draw)[:outliers]] *= gain
    stats = InputStats(K, torch.device("cpu"))
    stats.update(X)
    return weight, X, stats


def rounding_loss(weight: Tensor, X: Tensor, stats: InputStats) -> Callable[[Tensor], float]:
    """The loss as in the pipeline: squared error of the output, with the weight scaled, quantized and scaled back."""

    def loss(scales: Tensor) -> float:
        rounding = clip.round_weight(weight * scales, stats.in_basis(scaling(scales)), WeightScheme(4, 32), Options())
        return float((X @ (rounding.quantized.dequantize() / scales - weight).T).square().sum())

    return loss


def scales_by_hand(stats: InputStats, exponent: float) -> np.ndarray:
    """(K,) float64, for channels without ties."""
    scales = stats.mean_absolute.double().numpy() ** exponent
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()))


@pytest.mark.parametrize("seed", range(3))
def test_the_exponent_is_that_of_a_plain_scan(seed: int) -> None:
    weight, X, stats = layer(seed=seed)
    loss = rounding_loss(weight, X, stats)
    candidates = [scales_by_hand(stats, step / 20) for step in range(20)]
    losses = [loss(torch.tensor(candidate, dtype=torch.float32)) for candidate in candidates]
    best = int(np.argmin(losses))
    assert best > 0, "the example should need some scaling"
    scales = awq.channel_scales(stats, FREE, loss)
    assert scales is not None
    np.testing.assert_allclose(scales.numpy(), candidates[best], rtol=64 * EPSILON)  # a power in float32


@pytest.mark.parametrize("step", [1, 7, 19])
def test_every_exponent_can_be_chosen(step: int) -> None:
    *_, stats = layer()
    target = torch.tensor(scales_by_hand(stats, step / 20)).log()
    chosen = awq.channel_scales(stats, FREE, lambda scales: float((scales.double().log() - target).square().sum()))
    assert chosen is not None
    np.testing.assert_allclose(chosen.double().log().numpy(), target.numpy(), atol=64 * EPSILON)


def test_nothing_is_scaled_without_a_lower_loss() -> None:
    *_, stats = layer()
    assert awq.channel_scales(stats, FREE, lambda scales: float(scales.log().square().sum())) is None
    assert awq.channel_scales(stats, FREE, lambda scales: 1.0) is None  # equal is not better
    assert awq.channel_scales(stats, FREE, lambda scales: float("nan")) is None


def test_the_first_candidate_is_scales_of_one() -> None:
    *_, stats = layer()
    tried: list[Tensor] = []
    awq.channel_scales(stats, FREE, lambda scales: tried.append(scales) or 0.0)  # type: ignore[func-returns-value]
    assert len(tried) == 20
    assert torch.equal(tried[0], torch.ones(K))


def test_tied_channels_share_the_scale_of_their_mean() -> None:
    """As the heads of a value projection that several query heads read."""
    *_, stats = layer()
    tied = torch.arange(K) % 16
    scales = awq.channel_scales(
        stats, tied, lambda scales: -float(scales.log().square().sum())
    )  # prefers the largest exponent
    assert scales is not None
    assert torch.equal(scales, scales[:16].repeat(4))
    means = stats.mean_absolute.double().reshape(4, 16).mean(0).numpy() ** 0.95
    np.testing.assert_allclose(scales[:16].numpy(), means / np.sqrt(means.max() * means.min()), rtol=64 * EPSILON)


def test_a_column_without_a_channel_keeps_scale_one() -> None:
    *_, stats = layer()
    tied = FREE.clone()
    tied[[0, 9]] = -1
    chosen = awq.channel_scales(stats, tied, lambda scales: -float(scales.log().square().sum()))
    assert chosen is not None
    assert chosen[0] == chosen[9] == 1.0
    scaled = tied >= 0
    means = stats.mean_absolute.double()[scaled].numpy() ** 0.95
    np.testing.assert_allclose(chosen[scaled].numpy(), means / np.sqrt(means.max() * means.min()), rtol=64 * EPSILON)


def test_no_column_with_a_channel_means_no_scaling() -> None:
    *_, stats = layer()
    assert awq.channel_scales(stats, torch.full((K,), -1), lambda scales: float(scales.sum())) is None


def test_a_zero_channel_gets_a_finite_positive_scale() -> None:
    *_, stats = layer()
    stats._absolute[4] = 0
    chosen = awq.channel_scales(stats, FREE, lambda scales: -float(scales.log().square().sum()))
    assert chosen is not None
    assert bool(chosen.isfinite().all()) and float(chosen.min()) > 0


@pytest.mark.parametrize("seed", range(3))
def test_scaling_outlier_channels_beats_clipping_alone(seed: int) -> None:
    """On inputs that the exponent was not chosen by."""
    weight, X, stats = layer(seed=seed)
    scales = awq.channel_scales(stats, FREE, rounding_loss(weight, X[:100], stats))
    assert scales is not None
    validation_loss = rounding_loss(weight, X[100:], stats)
    assert validation_loss(scales) < 0.85 * validation_loss(torch.ones(K))
