"""Smoothing: the exponent with the lowest loss, scales of tied columns, and what it does to one static scale."""

import torch
from torch import Tensor

from llmq.algorithms import smooth
from llmq.numerics.block_diagonal import scaling
from llmq.numerics.input_stats import InputStats

K = 48
FREE = torch.arange(K)


def example() -> tuple[Tensor, Tensor, InputStats]:
    """A weight (N, K), inputs (T, K) with outlier channels, and their statistics in two batches."""
    draw = torch.Generator().manual_seed(0)
    weight, X = torch.randn(16, K, generator=draw), torch.randn(300, K, generator=draw)
    X[:, [3, 17]] *= 50.0
    stats = InputStats(K, torch.device("cpu"))
    stats.update(X[:200])
    stats.update(X[200:])
    return weight, X, stats


def static_loss(weight: Tensor, X: Tensor, basis: Tensor) -> float:
    """Of a product with inputs on one static min-max grid, and weights in float."""
    x, scales = X / basis.flatten(), basis.flatten()
    step = float(x.abs().max()) / 127
    return float((((x / step).round() * step - x) @ (weight * scales).T).square().sum())


def chosen(stats: InputStats, source: Tensor, weight: Tensor, X: Tensor) -> Tensor | None:
    return smooth.basis(stats, source, lambda: 1, lambda basis: static_loss(weight, X, basis))


def test_the_largest_inputs_are_those_of_all_batches() -> None:
    _, X, stats = example()
    assert torch.equal(stats.largest, X.abs().amax(0))
    basis = scaling(torch.linspace(0.5, 2, K))
    assert torch.allclose(stats.in_basis(basis).largest, (X / basis.flatten()).abs().amax(0))


def test_the_best_exponent_is_chosen() -> None:
    weight, X, stats = example()
    basis = chosen(stats, FREE, weight, X)
    assert basis is not None
    losses = {}
    for exponent in smooth.EXPONENTS:
        scales = X.abs().amax(0) ** exponent
        losses[exponent] = static_loss(weight, X, scaling(scales / (scales.max() * scales.min()).sqrt()))
    loss = static_loss(weight, X, basis)
    assert abs(loss / min(losses.values()) - 1) < 1e-4
    assert loss < 0.05 * static_loss(weight, X, scaling(torch.ones(K)))


def test_nothing_is_scaled_where_this_does_not_help() -> None:
    _, _, stats = example()
    assert smooth.basis(stats, FREE, lambda: 1, lambda basis: float((basis.flatten() - 1).abs().sum())) is None


def test_tied_columns_have_one_scale_and_fixed_columns_none() -> None:
    weight, X, stats = example()
    source = torch.arange(K) // 2
    source[-2:] = -1
    basis = chosen(stats, source, weight, X)
    assert basis is not None
    scales = basis.flatten()
    assert torch.equal(scales[0:-2:2], scales[1:-2:2]) and scales[-2:].tolist() == [1.0, 1.0]
