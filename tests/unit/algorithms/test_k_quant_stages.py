"""The stages on two-level grids, each compared with a slow reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, clip, descent, gptq, kl_tuning, output_error, refit, refit_k_quants, rtn
from llmq.algorithms.kl_tuning import Rates
from llmq.algorithms.ridge import RIDGE
from llmq.methods import Method
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor, Superblocks
from llmq.numerics.scheme import WeightScheme
from llmq.steps.round_group import round_group
from llmq_kernels.value_tables import IQ4
from tests.unit.algorithms.test_gptq import check_static

INTEGERS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
TWO_LEVEL = (*INTEGERS, "iq4_xs", "iq4_nl")
RATES = Rates(rounding=0.02, scales=0.01)
N, K = 5, 512
OPTIONS = Options(torch.float16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(columns: int = K, tokens: int = 1024, *, validation: bool = False) -> InputStats:
    """Statistics of correlated inputs with channels of different sizes."""
    mixing = random(columns, columns, seed=1) / columns**0.5 + torch.eye(columns)
    X = random(tokens, columns, seed=2) @ mixing * (torch.linspace(-1, 1, columns).exp())
    stats = InputStats(columns, torch.device("cpu"))
    stats.update(X)
    if validation:
        stats.begin_validation().update(
            random(tokens, columns, seed=3) @ mixing * (torch.linspace(-1, 1, columns).exp())
        )
    return stats


def parts(q: QuantizedTensor) -> Superblocks:
    assert q.superblocks is not None
    return q.superblocks


def nearest(weight: Tensor, kind: str) -> QuantizedTensor:
    chosen = affine_grid.fit_searched(weight, WeightScheme.of_blocks(kind), torch.float16)
    return chosen.quantized(chosen.encode(weight))


def in_steps(q: QuantizedTensor) -> Tensor:
    """The weight in units of its scales, (N, K) float64, with its offsets."""
    if q.scheme.table is not None:
        return torch.tensor(IQ4.numbers, dtype=torch.float64)[q.codes.long()]
    return q.codes.double() - (q.scheme.middle if q.scheme.symmetric else 0)


def consistent(q: QuantizedTensor) -> bool:
    """Whether scales and zero points are equal to those computed from the superblocks."""
    again = QuantizedTensor.of_superblocks(q.codes, parts(q), q.scheme)
    zeros = again.zeros is q.zeros or torch.equal(again.zeros, q.zeros)  # type: ignore[arg-type]
    return zeros and torch.equal(again.scales, q.scales)


# ---- rounding


@pytest.mark.parametrize("kind", INTEGERS)
def test_gptq_matches_the_reference(kind: str) -> None:
    stats = statistics(256)
    check_static(random(6, 256), stats, WeightScheme.of_blocks(kind), "activation", "searched", enough=0.3)


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_gptq_is_far_better_than_rounding_to_nearest(kind: str) -> None:
    weight, stats = random(N, K), statistics()
    scheme = WeightScheme.of_blocks(kind)
    compensated = gptq.round_weight(weight, stats, scheme, OPTIONS)
    loss, plain, clipped = (
        output_error(weight, stage.quantized.dequantize(), stats.second_moment())
        for stage in (
            compensated,
            rtn.round_weight(weight, stats, scheme, OPTIONS),
            clip.round_weight(weight, stats, scheme, OPTIONS),
        )
    )
    assert consistent(compensated.quantized)
    assert float(loss.sum()) < 0.7 * min(float(plain.sum()), float(clipped.sum()))


# ---- refinement


def coordinate_by_coordinate(target: Tensor, q: QuantizedTensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
    """sc and m of each row after one pass in which each is set to its best value, by trying all values."""
    grid, width = parts(q), q.scheme.columns_per_group(K)
    sc, m = grid.sc.double(), None if grid.m is None else grid.m.double()
    codes = in_steps(q)
    d = grid.d.double().repeat_interleave(256 // width, 1)
    dmin = None if grid.dmin is None else grid.dmin.double().repeat_interleave(256 // width, 1)
    H, w = hessian.double(), target.double()
    largest = {"q2_k": 15, "q3_k": 31, "q4_k": 63, "q6_k": 127, "iq4_xs": 31}[str(q.scheme)]

    def loss() -> Tensor:
        decoded = (d * sc).repeat_interleave(width, 1) * codes
        if m is not None and dmin is not None:
            decoded = decoded - (dmin * m).repeat_interleave(width, 1)
        return ((w - decoded) @ H * (w - decoded)).sum(1)

    def put(numbers: Tensor, group: int, values: list[int]) -> None:
        best, least = numbers[:, group].clone(), loss()
        for value in values:
            numbers[:, group] = value
            current = loss()
            best = torch.where(current < least, torch.full_like(best, value), best)
            least = torch.minimum(current, least)
        numbers[:, group] = best

    for group in range(sc.shape[1]):
        put(sc, group, [v for v in (range(-largest - 1, largest + 1) if m is None else range(1, largest + 1)) if v])
        if m is not None:
            put(m, group, list(range(largest + 1)))
    return sc, m


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_small_integers_get_their_best_values_in_turn(kind: str) -> None:
    target, hessian = random(2, 256), statistics(256).second_moment()
    start = nearest(target, kind)
    gradient = (target - start.dequantize()) @ hessian
    moved, moved_gradient = refit_k_quants._with_other_integers(start, gradient, hessian)
    torch.testing.assert_close(moved_gradient, (target - moved.dequantize()) @ hessian, rtol=1e-3, atol=1e-4)
    sc, m = coordinate_by_coordinate(target, start, hessian)
    assert torch.equal(parts(moved).sc.double(), sc)
    if m is not None:
        assert torch.equal(parts(moved).m.double(), m)  # type: ignore[union-attr]
    assert not torch.equal(parts(moved).sc, parts(start).sc)
    assert torch.equal(moved.codes, start.codes) and consistent(moved)


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_shared_numbers_are_those_of_a_dense_solver(kind: str) -> None:
    target, hessian = random(3, K), statistics().second_moment()
    q = nearest(target, kind)
    L = torch.linalg.cholesky(hessian.double() + 1e-6 * torch.eye(K))
    fitted = refit_k_quants._solved(q, (target - q.dequantize()) @ hessian, hessian)
    grid, groups = parts(q), q.column_groups()
    codes, width = in_steps(q), K // grid.d.shape[1]
    for row in range(len(target)):
        columns = [codes[row] * grid.sc[row, groups].double()]
        columns += [] if grid.m is None else [-grid.m[row, groups].double()]
        design = torch.zeros(K, fitted.shape[1], dtype=torch.float64)
        for number, column in enumerate(columns):
            for k in range(K):
                design[k, number * grid.d.shape[1] + k // width] = column[k]
        left = L.T @ design
        roots = (RIDGE * left.square().sum(0)).sqrt()
        right = torch.cat([L.T @ target[row].double(), roots * grid.shared()[row].double()])
        expected = torch.linalg.lstsq(torch.cat([left, torch.diag(roots)]), right).solution
        torch.testing.assert_close(fitted[row].double(), expected, rtol=2e-3, atol=2.0**-24)  # float16


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_no_refinement_makes_a_row_worse(kind: str) -> None:
    weight, stats = random(N, K), statistics()
    q = gptq.round_weight(weight, stats, WeightScheme.of_blocks(kind), OPTIONS).quantized
    for stage in (descent, refit):
        refined = stage.refine(weight, q, stats.second_moment(), OPTIONS)
        before, after = (output_error(weight, tensor.dequantize(), stats.second_moment()) for tensor in (q, refined))
        assert bool((after <= before).all()) and float(after.sum()) < float(before.sum())
        assert consistent(refined)
        q = refined


def test_validation_undoes_rows_as_a_whole() -> None:
    """A combination of two candidates takes each row from one of their grids."""
    weight, stats = random(N, K), statistics(validation=True)
    method = Method("gptq", refinements=("descent", "refit"), validation=0.1)
    weights = {"one": weight, "other": weight + 0.1 * random(N, K, seed=4)}
    schemes = {"one": WeightScheme.of_blocks("q4_k"), "other": WeightScheme.of_blocks("q6_k")}
    layers = list(round_group(weights, schemes, stats, method, OPTIONS))
    assert [str(layer.rounding.quantized.scheme) for layer in layers] == ["q4_k", "q6_k"]
    for layer in layers:
        assert [gain.stage for gain in layer.gains] == ["descent", "refit"]
        assert consistent(layer.rounding.quantized)


# ---- tuning


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_tuning_starts_at_exactly_the_given_weight(kind: str) -> None:
    weight = random(4, 256) * torch.tensor([1e-6, 1e-3, 1.0, 0.0])[:, None]
    origin = nearest(weight + 0.3 * random(4, 256, seed=9) * weight.abs().mean(1, keepdim=True), kind)
    for reference in (weight, 100 * weight, None):
        first = kl_tuning.result(kl_tuning.start(origin, reference, RATES))
        assert torch.equal(first.codes, origin.codes)
        assert torch.equal(first.dequantize(), origin.dequantize())


def straight(x: Tensor, y: Tensor) -> Tensor:
    return y.detach() + (x - x.detach())


def between(place: Tensor) -> Tensor:
    """The values of IQ4 at whole places, and on straight lines between them."""
    numbers = torch.tensor(IQ4.numbers)
    below = place.detach().floor().long().clamp(0, IQ4.largest - 1)
    return numbers[below] + (place - below) * (numbers[below + 1] - numbers[below])


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_tuning_matches_autograd_and_adam(kind: str) -> None:
    origin = nearest(random(3, K), kind)
    grid, groups = parts(origin), origin.column_groups()
    aim, steps = origin.dequantize() + 0.05 * random(3, K, seed=5), 8
    state = kl_tuning.start(origin, None, RATES)
    v, theta = torch.zeros(3, K, requires_grad=True), torch.zeros(grid.shared().shape, requires_grad=True)
    adam = torch.optim.Adam([{"params": [v]}, {"params": [theta]}], betas=(0.9, 0.95), eps=1e-12)

    def weight() -> Tensor:
        place = v + origin.codes
        codes = straight(place, place.detach().round().clamp(0, origin.scheme.levels))
        stretched = grid.shared() * (1 + theta)
        d, *dmin = straight(stretched, stretched.detach().half().float()).split(grid.d.shape[1], 1)
        together = grid.sc.shape[1] // grid.d.shape[1]
        scales = d.repeat_interleave(together, 1) * grid.sc
        if origin.scheme.table is not None:
            return straight(between(place), IQ4.values(codes.detach())) * scales[:, groups]
        if grid.m is None:
            return torch.mul(codes - origin.scheme.middle, scales[:, groups])
        offsets = dmin[0].repeat_interleave(together, 1) * grid.m
        return torch.sub(codes * scales[:, groups], offsets[:, groups])

    for step in range(steps):
        rates = RATES.at(step, steps)
        tuned = kl_tuning.result(state).dequantize()
        torch.testing.assert_close(
            tuned, weight().detach(), rtol=0, atol=2e-2
        )  # d is fp16: one unit in its last place, times 63 * 15
        kl_tuning.update(state, 2 * (tuned - aim), rates, step)
        for group, rate in zip(adam.param_groups, (rates.rounding, rates.scales), strict=True):
            group["lr"] = rate
        adam.zero_grad()
        (weight() - aim).square().sum().backward()
        adam.step()
        assert state.rounding is not None and state.scales is not None
        torch.testing.assert_close(state.scales.value, theta.detach(), rtol=0, atol=1e-3)
    assert not torch.equal(parts(kl_tuning.result(state)).d, grid.d)
    assert consistent(kl_tuning.result(state))
    loss, before = (float((tensor.dequantize() - aim).square().sum()) for tensor in (kl_tuning.result(state), origin))
    assert loss < before


def test_a_restored_state_is_the_same_state() -> None:
    origin = nearest(random(3, 256), "q4_k")
    state = kl_tuning.start(origin, random(3, 256, seed=6), RATES)
    kl_tuning.update(state, random(3, 256, seed=7), RATES, 0)
    kept = {name: tensor.clone() for name, tensor in kl_tuning.tensors(state).items()}
    again = kl_tuning.restored(origin, kept)
    assert torch.equal(kl_tuning.result(again).dequantize(), kl_tuning.result(state).dequantize())
    assert not np.array_equal(kl_tuning.result(state).dequantize(), origin.dequantize())
