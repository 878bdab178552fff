"""GPTQ compared with a slow reference that shares no code with it.

The reference is optimal brain quantization as in its paper, in NumPy and float64: the inverse of the remaining Hessian
is computed again at every column.  GPTQ computes in float32.  So a weight that is very close to the middle between two
codes may be rounded to either of them, and this changes all later weights of its row.  The reference reports which rows
came that close (`TIE`); all other rows must have exactly the same codes.
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
# A weight of up to 2**bits steps is updated at most K times, each time with a relative rounding error of 2**-24: for 16
# steps and 100 columns the sum is 1e-4 steps.  A longer row has more rounding errors, but they partly cancel.
TIE = 1e-4
# Each of the about 64 weights of a row comes that close with a probability of 2 TIE.  But the negative extreme of a
# symmetric min-max group is always a tie if no update comes before it.  Only the other rows are compared.
ENOUGH = 0.5
STATIC = [("activation", "searched"), ("activation", "minmax"), ("natural", "searched")]
GROUPINGS = (16, 32, "channel", "tensor")


def problem(N: int = 12, K: int = 64, T: int = 256, seed: int = 0) -> tuple[Tensor, InputStats]:
    """A weight (N, K) and correlated inputs of different sizes, so that order and compensation matter."""
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
class Reference:
    """codes and decoded weights (N, K); `clear` marks the rows (N,) without a near tie."""

    codes: Array
    decoded: Array
    clear: Array


def optimal_brain_quantizer(
    weight: Tensor, H: Array, order: Array, levels: int, steps: Callable[[int, Array], tuple[Array, Array]]
) -> Reference:
    """`steps(j, W)` gives scale and zero (N,) of column j, from the weights as compensated up to then."""
    W = weight.double().numpy().copy()
    codes, decoded, margin = np.zeros(W.shape, int), np.zeros(W.shape), np.full(len(W), np.inf)
    for position, j in enumerate(order):
        left = order[position:]
        inverse_row = np.linalg.solve(H[np.ix_(left, left)], np.eye(len(left))[0])  # row j of the inverse
        scale, zero = steps(j, W)
        value = W[:, j] / scale + zero
        margin = np.minimum(margin, margins(value, levels))
        codes[:, j] = np.clip(np.round(value), 0, levels)
        decoded[:, j] = scale * (codes[:, j] - zero)
        W[:, left] -= np.outer((W[:, j] - decoded[:, j]) / inverse_row[0], inverse_row)
    return Reference(codes, decoded, margin > TIE)


def margins(values: Array, levels: int) -> Array:
    """The distance of each value from the nearest middle between two codes."""
    boundary: Array = np.clip(np.floor(values), 0, levels - 1) + 0.5
    return np.asarray(np.abs(values - boundary))


def losses(weight: Tensor, decoded: Array, stats: InputStats) -> Array:
    """(N,) float64: mean squared change of each row's output."""
    difference = weight.double().numpy() - decoded
    return np.asarray(np.einsum("nk,kj,nj->n", difference, stats.second_moment().double().numpy(), difference))


def with_nearest_where_better(
    reference: Reference, weight: Tensor, stats: InputStats, columns: Array, levels: int
) -> Reference:
    """The last rule: a row that compensation made worse keeps its nearest codes.

    columns  (2, N, K), scales and zero points
    """
    scales, zeros = columns
    values = weight.double().numpy() / scales + zeros
    nearest = np.clip(np.round(values), 0, levels)
    plain, compensated = losses(weight, scales * (nearest - zeros), stats), losses(weight, reference.decoded, stats)
    codes = np.where((compensated > plain)[:, None], nearest, reference.codes)
    # The negative extreme of a symmetric min-max group is a tie: nearest codes must be far worse, or be clear as well.
    far_apart = compensated < 0.9 * plain
    clear = far_apart | ((margins(values, levels).min(1) > TIE) & (np.abs(compensated - plain) > 1e-3 * plain))
    return Reference(codes, scales * (codes - zeros), reference.clear & clear)


def check_against(
    reference: Reference,
    rounding: Rounding,
    weight: Tensor,
    stats: InputStats,
    *,
    scale_error: float,
    enough: float = ENOUGH,
) -> None:
    """All clear rows have equal codes, and nearly equal losses, as scales differ by the relative `scale_error`."""
    assert np.mean(reference.clear) >= enough, "too many rows near a tie for the test to say much"
    np.testing.assert_array_equal(rounding.quantized.codes.numpy()[reference.clear], reference.codes[reference.clear])
    # Triangle inequality: |sqrt(a) - sqrt(b)| is at most the norm of the difference of the two decoded weights.
    largest = np.linalg.eigvalsh(stats.second_moment().double().numpy())[-1]
    tolerance = scale_error * np.sqrt(largest) * np.linalg.norm(reference.decoded, axis=1)
    fast = np.sqrt(losses(weight, rounding.quantized.dequantize().double().numpy(), stats))
    slow = np.sqrt(losses(weight, reference.decoded, stats))
    assert (np.abs(fast - slow) <= tolerance)[reference.clear].all()


# ---- static grids


def check_static(
    weight: Tensor, stats: InputStats, scheme: WeightScheme, order: str, scales: str, enough: float = ENOUGH
) -> None:
    rounding = gptq.round_weight(weight, stats, scheme, Options(order=order, scales=scales, damping=DAMPING))
    N, K = weight.shape
    q = rounding.quantized
    group = np.arange(K) // scheme.columns_per_group(K)
    scale = q.scales.double().numpy()[:, group]
    zero = np.full((N, K), 2.0 ** (scheme.bits - 1)) if q.zeros is None else q.zeros.double().numpy()[:, group]
    diagonal = np.diag(stats.second_moment().numpy())
    visits = np.argsort(-diagonal, kind="stable") if order == "activation" else np.arange(K)
    levels = 2**scheme.bits - 1
    reference = optimal_brain_quantizer(weight, damped(stats), visits, levels, lambda j, _: (scale[:, j], zero[:, j]))
    reference = with_nearest_where_better(reference, weight, stats, np.stack([scale, zero]), levels)
    check_against(reference, rounding, weight, stats, scale_error=2.0**-23, enough=enough)


@pytest.mark.parametrize(("order", "scales"), STATIC)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq_matches_the_reference(order: str, scales: str, grouping: int | str, symmetric: bool) -> None:
    weight, stats = problem()
    check_static(weight, stats, WeightScheme(4, grouping, symmetric), order, scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_matches_the_reference_at_other_bits(bits: int) -> None:
    weight, stats = problem(seed=bits)
    # At 8 bits the same weight is 16 times as many steps away from zero, and so are its rounding errors.
    check_static(weight, stats, WeightScheme(bits, 32, symmetric=False), "activation", "searched")


def test_gptq_matches_the_reference_beyond_a_block_of_columns() -> None:
    weight, stats = problem(K=160, T=512)  # a whole block of 128, and one that is not full
    check_static(weight, stats, WeightScheme(4, 32), "activation", "searched")


# ---- the paper's grid, which is fitted group by group while columns are rounded


def growing_steps(scheme: WeightScheme, K: int) -> Callable[[int, Array], tuple[Array, Array]]:
    """Min-max of a group's weights when its first column is reached; of all weights for the group size "tensor"."""
    width, levels = scheme.columns_per_group(K), 2**scheme.bits - 1
    current: list[Array] = []

    def steps(j: int, W: Array) -> tuple[Array, Array]:
        if j % width == 0:
            whole_weight = np.broadcast_to(W.reshape(1, -1), (len(W), W.size))
            group = whole_weight if scheme.group_size == "tensor" else W[:, j : j + width]
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
    rounding = gptq.round_weight(weight, stats, scheme, options)
    K, levels = weight.shape[1], 2**scheme.bits - 1
    visited: list[tuple[Array, Array]] = []
    steps = growing_steps(scheme, K)

    def recorded(j: int, W: Array) -> tuple[Array, Array]:
        visited.append(steps(j, W))
        return visited[-1]

    reference = optimal_brain_quantizer(weight, damped(stats), np.arange(K), levels, recorded)
    columns = np.stack([np.stack(part, axis=1) for part in zip(*visited, strict=True)])
    reference = with_nearest_where_better(reference, weight, stats, columns, levels)
    # The range of a group has the same error as its weights: TIE steps out of at least 2**bits - 1.
    scale_error = 2 * TIE / levels
    check_against(reference, rounding, weight, stats, scale_error=scale_error)
    firsts = columns[0][:, :: scheme.columns_per_group(K)]
    scales = rounding.quantized.scales.double().numpy()
    np.testing.assert_allclose(scales[reference.clear], firsts[reference.clear], rtol=scale_error)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq_of_the_paper_matches_the_reference(grouping: int | str, symmetric: bool) -> None:
    weight, stats = problem()
    check_growing(weight, stats, WeightScheme(4, grouping, symmetric))  # type: ignore[arg-type]


def test_gptq_of_the_paper_handles_groups_larger_than_a_block() -> None:
    """Two groups of 256 columns: the range of the second one must wait for all updates of the first."""
    weight, stats = problem(N=4, K=512, T=1024)
    check_growing(weight, stats, WeightScheme(4, 256))


# ---- the factorisation


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_factor_matches_the_inverse_in_visiting_order(order: str) -> None:
    _, stats = problem(K=48)
    factor = factorize(stats.second_moment(), order, DAMPING)
    assert factor is not None and factor.damping == DAMPING
    visits = factor.order.numpy()
    inverse = np.linalg.inv(damped(stats)[np.ix_(visits, visits)])
    expected = np.linalg.cholesky(inverse).T  # upper, U'U = H^-1
    # Solved in float64 and stored in float32; the error is relative to the largest entry of the row.
    assert (np.abs(factor.upper.numpy() - expected) <= 2.0**-23 * np.abs(expected).max(1, keepdims=True)).all()
    assert sorted(visits) == list(range(48))
    if order == "activation":
        assert (np.diff(stats.mean_square.numpy()[visits]) <= 0).all()
    else:
        assert visits.tolist() == list(range(48))


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_prices_of_columns_are_in_memory_order(order: str) -> None:
    _, stats = problem(K=48)
    factor = factorize(stats.second_moment(), order, DAMPING)
    assert factor is not None
    expected = 1 / np.diag(np.linalg.inv(damped(stats)))
    np.testing.assert_allclose(factor.price.numpy(), expected, rtol=2.0**-22)


def test_scales_are_searched_with_the_prices() -> None:
    weight, stats = problem()
    scheme, options = WeightScheme(3, 32), Options(scale_dtype=torch.bfloat16)
    factor = factorize(stats.second_moment(), options.order, options.damping)
    assert factor is not None
    chosen = affine_grid.fit_searched(weight, scheme, torch.bfloat16, factor.price)
    quantized = gptq.round_weight(weight, stats, scheme, options).quantized
    assert torch.equal(quantized.scales, chosen.scales) and quantized.scales.dtype == torch.bfloat16
    assert not torch.equal(chosen.scales, affine_grid.fit_searched(weight, scheme, torch.bfloat16).scales)
