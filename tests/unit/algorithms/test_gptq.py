"""GPTQ against a slow twin that shares no code with it.

The twin is optimal brain quantization as its paper states it, in NumPy and float64: at every column the inverse of
what is left of the Hessian is computed anew.  GPTQ computes in float32, so a weight that lies closer to the middle
between two codes than float32 can tell may go either way, and all that follow it in its row with it.  So the twin says
which rows came that close (`TIE`); all others must have the same codes, every one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.algorithms import Options, Rounding, gptq
from llmq.algorithms.factor import factorize
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme

Array = NDArray[Any]
DAMPING = 0.01
# A weight of up to 2**bits steps is updated at most K times, each time rounded by 2**-24 of itself: for 16 steps and
# 100 columns that is 1e-4 of a step.  A longer row has more roundings, which then cancel better than one by one.
TIE = 1e-4
# Each of the 64 or so weights of a row comes that close with a chance of 2 TIE.  But the negative extreme of a
# symmetric min-max group is a tie by definition, if no update comes before it: what counts is the other rows.
ENOUGH = 0.5
STATIC = [("activation", "searched"), ("activation", "minmax"), ("natural", "searched")]
GROUPINGS = (16, 32, "channel", "tensor")


def problem(N: int = 12, K: int = 64, T: int = 256, seed: int = 0) -> tuple[Tensor, InputStats]:
    """A weight (N, K) and correlated inputs of unlike size, so that order and compensation matter."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((T, K)) @ (draw.standard_normal((K, K)) / np.sqrt(K) + np.eye(K)) * draw.uniform(0.2, 3, K)
    stats = InputStats(K, torch.device("cpu"))
    stats.update(torch.tensor(X, dtype=torch.float32))
    return torch.tensor(draw.standard_normal((N, K)), dtype=torch.float32), stats


def damped(stats: InputStats) -> Array:
    """(K, K) float64: H with its damping."""
    H = stats.second_moment().double().numpy()
    return H + DAMPING * np.mean(np.diag(H)) * np.eye(len(H))


@dataclass
class Twin:
    """codes and decoded weights (N, K); which rows (N,) came near no tie."""

    codes: Array
    decoded: Array
    clear: Array


def optimal_brain_quantizer(
    weight: Tensor, H: Array, order: Array, levels: int, steps: Callable[[int, Array], tuple[Array, Array]]
) -> Twin:
    """`steps(j, W)` gives scale and zero (N,) of column j, from the weights as compensated up to then."""
    W = weight.double().numpy().copy()
    codes, decoded, margin = np.zeros(W.shape, int), np.zeros(W.shape), np.full(len(W), np.inf)
    for position, j in enumerate(order):
        left = order[position:]
        inverse_row = np.linalg.solve(H[np.ix_(left, left)], np.eye(len(left))[0])  # of the inverse, the row of j
        scale, zero = steps(j, W)
        value = W[:, j] / scale + zero
        margin = np.minimum(margin, margins(value, levels))
        codes[:, j] = np.clip(np.round(value), 0, levels)
        decoded[:, j] = scale * (codes[:, j] - zero)
        W[:, left] -= np.outer((W[:, j] - decoded[:, j]) / inverse_row[0], inverse_row)
    return Twin(codes, decoded, margin > TIE)


def margins(values: Array, levels: int) -> Array:
    """How far each value is from the middle between two codes; there is none beyond the last code."""
    boundary: Array = np.clip(np.floor(values), 0, levels - 1) + 0.5
    return np.asarray(np.abs(values - boundary))


def losses(weight: Tensor, decoded: Array, stats: InputStats) -> Array:
    """(N,) float64: mean squared change of each row's output."""
    difference = weight.double().numpy() - decoded
    return np.asarray(np.einsum("nk,kj,nj->n", difference, stats.second_moment().double().numpy(), difference))


def with_nearest_where_better(twin: Twin, weight: Tensor, stats: InputStats, columns: Array, levels: int) -> Twin:
    """The last rule: a row that compensation made worse keeps its nearest codes; `columns` (2, N, K) scales, zeros."""
    scales, zeros = columns
    values = weight.double().numpy() / scales + zeros
    nearest = np.clip(np.round(values), 0, levels)
    plain, compensated = losses(weight, scales * (nearest - zeros), stats), losses(weight, twin.decoded, stats)
    codes = np.where((compensated > plain)[:, None], nearest, twin.codes)
    # The negative extreme of a symmetric min-max group is a tie, so nearest codes must lose by far or be clear as well.
    far_apart = compensated < 0.9 * plain
    clear = far_apart | ((margins(values, levels).min(1) > TIE) & (np.abs(compensated - plain) > 1e-3 * plain))
    return Twin(codes, scales * (codes - zeros), twin.clear & clear)


def check_against(
    twin: Twin, found: Rounding, weight: Tensor, stats: InputStats, *, scale_error: float, enough: float = ENOUGH
) -> None:
    """Equal codes in all clear rows; and, as scales differ by `scale_error` of themselves, nearly equal losses."""
    assert np.mean(twin.clear) >= enough, "too many rows near a tie for the test to say much"
    np.testing.assert_array_equal(found.quantized.codes.numpy()[twin.clear], twin.codes[twin.clear])
    # Triangle inequality: |sqrt(a) - sqrt(b)| is at most the size of what lies between the two decoded weights.
    largest = np.linalg.eigvalsh(stats.second_moment().double().numpy())[-1]
    tolerance = scale_error * np.sqrt(largest) * np.linalg.norm(twin.decoded, axis=1)
    fast = np.sqrt(losses(weight, found.quantized.dequantize().double().numpy(), stats))
    slow = np.sqrt(losses(weight, twin.decoded, stats))
    assert (np.abs(fast - slow) <= tolerance)[twin.clear].all()


# ---- static grids


def check_static(
    weight: Tensor, stats: InputStats, scheme: WeightScheme, order: str, scales: str, enough: float = ENOUGH
) -> None:
    found = gptq.round_weight(weight, stats, scheme, Options(order=order, scales=scales, damping=DAMPING))
    N, K = weight.shape
    q = found.quantized
    group = np.arange(K) // scheme.columns_per_group(K)
    scale = q.scales.double().numpy()[:, group]
    zero = np.full((N, K), 2.0 ** (scheme.bits - 1)) if q.zeros is None else q.zeros.double().numpy()[:, group]
    diagonal = np.diag(stats.second_moment().numpy())
    visits = np.argsort(-diagonal, kind="stable") if order == "activation" else np.arange(K)
    levels = 2**scheme.bits - 1
    twin = optimal_brain_quantizer(weight, damped(stats), visits, levels, lambda j, _: (scale[:, j], zero[:, j]))
    twin = with_nearest_where_better(twin, weight, stats, np.stack([scale, zero]), levels)
    check_against(twin, found, weight, stats, scale_error=2.0**-23, enough=enough)


@pytest.mark.parametrize(("order", "scales"), STATIC)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq_matches_the_slow_twin(order: str, scales: str, grouping: int | str, symmetric: bool) -> None:
    weight, stats = problem()
    check_static(weight, stats, WeightScheme(4, grouping, symmetric), order, scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_matches_the_slow_twin_at_other_bits(bits: int) -> None:
    weight, stats = problem(seed=bits)
    # At 8 bits the same weight is 16 times as many steps away from zero, and so are its roundings.
    check_static(weight, stats, WeightScheme(bits, 32, symmetric=False), "activation", "searched")


def test_gptq_matches_the_slow_twin_beyond_a_block_of_columns() -> None:
    weight, stats = problem(K=160, T=512)  # a whole block of 128, and one that is not full
    check_static(weight, stats, WeightScheme(4, 32), "activation", "searched")


# ---- the paper's grid, which grows while columns are rounded


def growing_steps(scheme: WeightScheme, K: int) -> Callable[[int, Array], tuple[Array, Array]]:
    """Min-max of a group's weights when its first column is reached; of all weights at once where one scale is all."""
    width, levels = scheme.columns_per_group(K), 2**scheme.bits - 1
    current: list[Array] = []

    def steps(j: int, W: Array) -> tuple[Array, Array]:
        if j % width == 0:
            everything = np.broadcast_to(W.reshape(1, -1), (len(W), W.size))
            group = everything if scheme.group_size == "tensor" else W[:, j : j + width]
            if scheme.symmetric:
                scale, zero = 2 * np.abs(group).max(1) / levels, np.full(len(W), 2.0 ** (scheme.bits - 1))
            else:
                low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
                scale = (high - low) / levels
                zero = np.clip(np.round(-low / scale), 0, levels)
            current[:] = [scale, zero]
        return current[0], current[1]

    return steps


def check_growing(weight: Tensor, stats: InputStats, scheme: WeightScheme) -> None:
    options = Options(order="natural", scales="minmax", damping=DAMPING)
    found = gptq.round_weight(weight, stats, scheme, options)
    K, levels = weight.shape[1], 2**scheme.bits - 1
    seen: list[tuple[Array, Array]] = []
    steps = growing_steps(scheme, K)

    def recorded(j: int, W: Array) -> tuple[Array, Array]:
        seen.append(steps(j, W))
        return seen[-1]

    twin = optimal_brain_quantizer(weight, damped(stats), np.arange(K), levels, recorded)
    columns = np.stack([np.stack(part, axis=1) for part in zip(*seen, strict=True)])
    twin = with_nearest_where_better(twin, weight, stats, columns, levels)
    # The range of a group is off by as much as its weights: TIE steps of at least 2**bits - 1 in all.
    scale_error = 2 * TIE / levels
    check_against(twin, found, weight, stats, scale_error=scale_error)
    firsts = columns[0][:, :: scheme.columns_per_group(K)]
    scales = found.quantized.scales.double().numpy()
    np.testing.assert_allclose(scales[twin.clear], firsts[twin.clear], rtol=scale_error)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq_as_in_the_paper_matches_the_slow_twin(grouping: int | str, symmetric: bool) -> None:
    weight, stats = problem()
    check_growing(weight, stats, WeightScheme(4, grouping, symmetric))  # type: ignore[arg-type]


def test_gptq_as_in_the_paper_sees_the_whole_of_a_group_larger_than_a_block() -> None:
    """Two groups of 256 columns: the range of the second one must wait for all updates of the first."""
    weight, stats = problem(N=4, K=512, T=1024)
    check_growing(weight, stats, WeightScheme(4, 256))


# ---- the factorisation


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_factor_is_that_of_the_inverse_in_visiting_order(order: str) -> None:
    _, stats = problem(K=48)
    factor = factorize(stats.second_moment(), order, DAMPING)
    assert factor is not None and factor.damping == DAMPING
    visits = factor.order.numpy()
    inverse = np.linalg.inv(damped(stats)[np.ix_(visits, visits)])
    expected = np.linalg.cholesky(inverse).T  # upper, U'U = H^-1
    # Solved in float64 and kept in float32; an entry that nearly cancels is measured by the largest of its row.
    assert (np.abs(factor.upper.numpy() - expected) <= 2.0**-23 * np.abs(expected).max(1, keepdims=True)).all()
    assert sorted(visits) == list(range(48))
    if order == "activation":
        assert (np.diff(stats.mean_square.numpy()[visits]) <= 0).all()
    else:
        assert visits.tolist() == list(range(48))


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_price_of_a_column_is_in_the_order_of_memory(order: str) -> None:
    _, stats = problem(K=48)
    factor = factorize(stats.second_moment(), order, DAMPING)
    assert factor is not None
    expected = 1 / np.diag(np.linalg.inv(damped(stats)))
    np.testing.assert_allclose(factor.price.numpy(), expected, rtol=2.0**-22)


def test_scales_are_searched_with_that_price() -> None:
    weight, stats = problem()
    scheme, options = WeightScheme(3, 32), Options(scale_dtype=torch.bfloat16)
    factor = factorize(stats.second_moment(), options.order, options.damping)
    assert factor is not None
    chosen = affine_grid.fit_searched(weight, scheme, torch.bfloat16, factor.price)
    found = gptq.round_weight(weight, stats, scheme, options).quantized
    assert torch.equal(found.scales, chosen.scales) and found.scales.dtype == torch.bfloat16
    assert not torch.equal(chosen.scales, affine_grid.fit_searched(weight, scheme, torch.bfloat16).scales)
