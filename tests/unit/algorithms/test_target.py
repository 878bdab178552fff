"""The asymmetric target compared with least squares on explicit inputs, in float64."""

import math

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, target
from llmq.algorithms.factor import Factor, factorize
from llmq.algorithms.validation_loss import ValidationLoss
from llmq.numerics.input_stats import InputStats

T, K, N = 60, 12, 5
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def streams(seed: int, drift: float = 0.1) -> tuple[Tensor, Tensor]:
    """X and X̂ (T, K): correlated channels of different sizes, and the same with errors of earlier layers."""
    X = random(T, K, seed=seed) @ random(K, K, seed=7) * torch.linspace(0.2, 3, K)
    return X, X * 0.97 + drift * random(T, K, seed=seed + 1)


def fitted(X: Tensor, moved: Tensor) -> InputStats:
    stats = InputStats(K, CPU)
    stats.update(moved, X)
    return stats


def judge(X: Tensor, moved: Tensor) -> InputStats:
    validation = InputStats(K, CPU).begin_validation()
    validation.update(moved, X)
    return validation


def factor_of(stats: InputStats, options: Options) -> Factor:
    factor = factorize(stats.second_moment(), options.order, options.damping)
    assert factor is not None
    return factor


def loss(weight: Tensor, rounded: Tensor, X: Tensor, moved: Tensor) -> float:
    """‖X wᵀ - X̂ ŵᵀ‖²/T"""
    return float((X.double() @ weight.double().T - moved.double() @ rounded.double().T).square().sum() / T)


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_whole_step_ends_at_the_least_squares_solution(order: str) -> None:
    """Damping is a ridge that pulls w* towards w: rows √λ below X̂, with √λ w on the right side."""
    (X, moved), weight = streams(0), random(N, K, seed=5)
    stats = fitted(X, moved)
    factor = factor_of(stats, Options(order=order))
    cross = stats.cross_moment()
    assert cross is not None
    solution = weight + target.step(weight, cross, factor)
    damping = factor.damping * float((moved.double() ** 2).sum() / T / K)
    left = torch.cat([moved.double() / math.sqrt(T), math.sqrt(damping) * torch.eye(K, dtype=torch.float64)])
    right = torch.cat([X.double() @ weight.double().T / math.sqrt(T), math.sqrt(damping) * weight.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert float((expected - weight).norm()) > 0.01 * float(weight.norm())  # the step is not trivial
    torch.testing.assert_close(
        solution.double(), expected, rtol=0, atol=1e-4
    )  # float32, with a condition number of about 100


def test_alpha_is_chosen_by_the_validation_loss() -> None:
    (X, moved), weight = streams(0), random(N, K, seed=5)
    stats = fitted(X, moved)
    cross = stats.cross_moment()
    assert cross is not None
    V = target.step(weight, cross, factor_of(stats, Options()))
    bend = torch.linalg.lstsq(X, moved).solution - torch.eye(K)  # X̂ ≈ X + X bend
    alphas, winners = (1.0, 0.5, 0.25), set()
    for seed, part in (
        (0, 1.0),
        (20, 0.55),
        (40, 0.3),
        (60, 0.0),
    ):  # how much of the drift is also in the validation text
        other, _ = streams(seed)
        after = other + part * (other @ bend)
        chosen = target.choose(weight, V, alphas, ValidationLoss(weight, judge(other, after)).along(V))
        losses = {alpha: loss(weight, weight + alpha * V, other, after) for alpha in (0.0, *alphas)}
        assert chosen.alpha == min(losses, key=lambda alpha: losses[alpha])
        assert torch.equal(chosen.weight, weight + chosen.alpha * V)
        assert chosen.before == pytest.approx(losses[0.0], rel=1e-4, abs=1e-9)
        assert chosen.after == pytest.approx(losses[chosen.alpha], rel=1e-2, abs=1e-9)
        winners.add(chosen.alpha)
    assert {0.0, 1.0} < winners  # both ends and a value between them


@pytest.mark.parametrize("drift", [1.0, math.nan, math.inf])
def test_a_step_longer_than_half_the_weight_is_not_taken(drift: float) -> None:
    (X, moved), weight = streams(0), random(N, K, seed=5)
    V = weight * 0.6 if drift == 1.0 else torch.full_like(weight, drift)
    for validation in (None, judge(X, moved)):
        loss = None if validation is None else ValidationLoss(weight, validation).along(V)
        chosen = target.choose(weight, V, (1.0,), loss)
        assert chosen.alpha == 0 and torch.equal(chosen.weight, weight)
        assert chosen.notes == (
            "no asymmetric target: it differs from the weight by more than half of the weight's norm",
        )


def test_without_validation_the_largest_allowed_alpha_is_taken() -> None:
    weight = random(N, K, seed=5)
    chosen = target.choose(weight, weight * 0.6, (0.25, 1.0, 0.5), None)
    assert chosen.alpha == 0.5 and chosen.before is None and not chosen.notes
    torch.testing.assert_close(chosen.weight, weight * 1.3)


def test_validation_without_float_inputs_is_ignored() -> None:
    weight, validation = random(N, K, seed=5), InputStats(K, CPU).begin_validation()
    validation.update(random(T, K))
    loss = ValidationLoss(weight, validation).along(weight * 0.1)
    assert loss is None and target.choose(weight, weight * 0.1, (0.5,), loss).alpha == 0.5


@pytest.mark.parametrize("strip", [1, 5, 64])
def test_products_with_a_triangle_are_those_with_the_matrix(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "STRIP", strip)
    rows, upper = random(N, K), random(K, K, seed=1).triu()
    torch.testing.assert_close(target.times_upper(rows, upper), rows @ upper)
    torch.testing.assert_close(target.times_upper(rows, upper, transposed=True), rows @ upper.T)
