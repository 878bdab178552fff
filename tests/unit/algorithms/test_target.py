"""The asymmetric target against least squares on explicit inputs, in float64."""

import math

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, target
from llmq.algorithms.factor import Factor, factorize
from llmq.numerics.input_stats import InputStats

T, K, N = 60, 12, 5
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def streams(seed: int, drift: float = 0.1) -> tuple[Tensor, Tensor]:
    """X and X̂ (T, K): correlated channels of unlike sizes, and what rounding before has made of them."""
    X = random(T, K, seed=seed) @ random(K, K, seed=7) * torch.linspace(0.2, 3, K)
    return X, X * 0.97 + drift * random(T, K, seed=seed + 1)


def seen(X: Tensor, moved: Tensor) -> InputStats:
    stats = InputStats(K, CPU)
    stats.update(moved, X)
    return stats


def judge(X: Tensor, moved: Tensor) -> InputStats:
    held_out = InputStats(K, CPU).hold_out()
    held_out.update(moved, X)
    return held_out


def factor_of(stats: InputStats, options: Options) -> Factor:
    factor = factorize(stats.second_moment(), options.order, options.damping)
    assert factor is not None
    return factor


def loss(weight: Tensor, rounded: Tensor, X: Tensor, moved: Tensor) -> float:
    """‖X wᵀ - X̂ ŵᵀ‖²/T"""
    return float((X.double() @ weight.double().T - moved.double() @ rounded.double().T).square().sum() / T)


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_whole_step_ends_at_the_least_squares_solution(order: str) -> None:
    """Damping is a ridge that draws w* to w: rows √λ below X̂, with √λ w on the right."""
    (X, moved), weight = streams(0), random(N, K, seed=5)
    stats = seen(X, moved)
    factor = factor_of(stats, Options(order=order))
    cross = stats.cross_moment()
    assert cross is not None
    found = weight + target.step(weight, cross, factor)
    damping = factor.damping * float((moved.double() ** 2).sum() / T / K)
    left = torch.cat([moved.double() / math.sqrt(T), math.sqrt(damping) * torch.eye(K, dtype=torch.float64)])
    right = torch.cat([X.double() @ weight.double().T / math.sqrt(T), math.sqrt(damping) * weight.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert float((expected - weight).norm()) > 0.01 * float(weight.norm())  # there is something to find
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)  # float32, of a condition of about 100


def test_the_strength_is_chosen_by_the_loss_on_held_out_tokens() -> None:
    (X, moved), weight = streams(0), random(N, K, seed=5)
    stats = seen(X, moved)
    cross = stats.cross_moment()
    assert cross is not None
    V = target.step(weight, cross, factor_of(stats, Options()))
    bend = torch.linalg.lstsq(X, moved).solution - torch.eye(K)  # X̂ ≈ X + X bend
    alphas, winners = (1.0, 0.5, 0.25), set()
    for seed, part in ((0, 1.0), (20, 0.55), (40, 0.3), (60, 0.0)):  # part of the drift is there in unseen text, too
        other, _ = streams(seed)
        after = other + part * (other @ bend)
        found = target.choose(weight, V, alphas, judge(other, after))
        losses = {alpha: loss(weight, weight + alpha * V, other, after) for alpha in (0.0, *alphas)}
        assert found.alpha == min(losses, key=lambda each: losses[each])
        assert torch.equal(found.weight, weight + found.alpha * V)
        assert found.before == pytest.approx(losses[0.0], rel=1e-4, abs=1e-9)
        assert found.after == pytest.approx(losses[found.alpha], rel=1e-2, abs=1e-9)
        winners.add(found.alpha)
    assert {0.0, 1.0} < winners  # both ends and something between


@pytest.mark.parametrize("drift", [1.0, math.nan, math.inf])
def test_a_step_longer_than_half_the_weight_is_not_taken(drift: float) -> None:
    (X, moved), weight = streams(0), random(N, K, seed=5)
    V = weight * 0.6 if drift == 1.0 else torch.full_like(weight, drift)
    for held_out in (None, judge(X, moved)):
        found = target.choose(weight, V, (1.0,), held_out)
        assert found.alpha == 0 and torch.equal(found.weight, weight)
        assert found.notes == ("the target is left out, it is further than half the weight away",)


def test_without_held_out_tokens_the_largest_step_that_is_not_too_long_is_taken() -> None:
    weight = random(N, K, seed=5)
    found = target.choose(weight, weight * 0.6, (0.25, 1.0, 0.5), None)
    assert found.alpha == 0.5 and found.before is None and not found.notes
    torch.testing.assert_close(found.weight, weight * 1.3)


def test_held_out_tokens_without_their_originals_do_not_judge() -> None:
    weight, held_out = random(N, K, seed=5), InputStats(K, CPU).hold_out()
    held_out.update(random(T, K))
    assert target.choose(weight, weight * 0.1, (0.5,), held_out).alpha == 0.5
