"""Tuning of one weight compared with autograd through the same function and torch's Adam."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Rates, State
from llmq.numerics.affine_grid import SMALLEST_SCALE, fit_minmax
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

RATES = Rates(rounding=0.02, scales=0.01)
SCHEMES = [
    WeightScheme(bits=4, group_size=16, symmetric=True),
    WeightScheme(bits=2, group_size=16, symmetric=False),
    WeightScheme(bits=3, group_size="channel", symmetric=False),
]
STEPS = 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """Codes that are not the nearest ones, as from an error-compensating method."""
    grid = fit_minmax(weight, scheme, dtype)
    return grid.quantized(grid.encode(weight + 0.3 * weight.std() * random(*weight.shape, seed=9)))


def straight(x: Tensor, y: Tensor) -> Tensor:
    """Exactly y, with the gradient of x."""
    return y.detach() + (x - x.detach())


class Reference:
    """The same tuning with autograd and torch's optimizer; `step` corresponds to `update`."""

    def __init__(self, origin: QuantizedTensor, v: Tensor) -> None:
        self.origin = origin
        self.v = v.clone().requires_grad_(True)
        self.theta = torch.zeros(origin.scales.shape, requires_grad=True)
        parts = [{"params": [self.v], "lr": 1.0}, {"params": [self.theta], "lr": 1.0}]
        self.adam = torch.optim.Adam(parts, betas=(0.9, 0.95), eps=1e-12)

    def weight(self) -> Tensor:
        origin, groups = self.origin, self.origin.column_groups()
        zeros = origin.scheme.middle if origin.zeros is None else origin.zeros.float()[:, groups]
        place = self.v + origin.codes
        codes = straight(place, place.detach().round().clamp(0, origin.scheme.levels))
        stretched = origin.scales.float() * (1 + self.theta)
        scales = straight(stretched, stretched.detach().to(origin.scales.dtype).float())
        product: Tensor = scales[:, groups] * (codes - zeros)
        return product

    def step(self, loss: Callable[[Tensor], Tensor], rates: Rates) -> None:
        self.adam.param_groups[0]["lr"], self.adam.param_groups[1]["lr"] = rates.rounding, rates.scales
        self.adam.zero_grad()
        loss(self.weight()).backward()
        assert self.v.grad is not None
        place = self.v.detach() + self.origin.codes
        self.v.grad[(place > self.origin.scheme.levels) & (self.v.grad < 0)] = 0
        self.v.grad[(place < 0) & (self.v.grad > 0)] = 0
        self.adam.step()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_steps_are_those_of_autograd_and_adam(scheme: WeightScheme) -> None:
    weight, target = random(6, 32), random(6, 32, seed=1)
    inputs = random(20, 32, seed=2)
    origin = rounded(weight, scheme)

    def loss(decoded: Tensor) -> Tensor:
        return (inputs @ (decoded - target).T).square().mean()

    state = kl_tuning.start(origin, weight, RATES)
    assert state.rounding is not None and state.scales is not None
    reference = Reference(origin, state.rounding.value)
    for step in range(STEPS):
        decoded = kl_tuning.result(state).dequantize()
        # Both are rounded to the storage dtype from numbers that differ by float32 rounding errors.
        torch.testing.assert_close(decoded, reference.weight().detach(), rtol=2e-3, atol=0)
        leaf = decoded.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        kl_tuning.update(state, gradient, RATES.at(step, STEPS), step)
        reference.step(loss, RATES.at(step, STEPS))
        torch.testing.assert_close(state.rounding.value, reference.v.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(state.scales.value, reference.theta.detach(), rtol=0, atol=1e-4)
    assert (kl_tuning.result(state).codes != origin.codes).any()
    assert not torch.equal(kl_tuning.result(state).scales, origin.scales)


def test_short_dtypes_take_half_of_the_memory_and_nearly_the_same_steps() -> None:
    weight, target, inputs = random(6, 32), random(6, 32, seed=1), random(20, 32, seed=2)
    values: list[Tensor] = []
    for dtypes in (kl_tuning.SHORT, kl_tuning.FULL):
        state = kl_tuning.start(rounded(weight, SCHEMES[0]), weight, RATES, dtypes)
        for step in range(STEPS):
            decoded = kl_tuning.result(state).dequantize()
            gradient = (inputs.T @ inputs @ (decoded - target).T).T
            kl_tuning.update(state, gradient, RATES.at(step, STEPS), step)
        assert state.rounding is not None
        values.append(state.rounding.value.float())
        sizes = sum(t.element_size() for t in (state.rounding.value, state.rounding.mean, state.rounding.square))
        assert sizes == (6 if dtypes == kl_tuning.SHORT else 12)
    assert (values[0] - values[1]).abs().max() < 0.02 * STEPS * RATES.rounding


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tuning_starts_at_exactly_the_given_weight(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weight = random(8, 64)
    weight[0] = 0  # gives the smallest scale
    weight[1] *= 1e-6
    origin = rounded(weight, scheme, dtype)
    for reference in (weight, 100 * weight, None):
        state = kl_tuning.start(origin, reference, RATES)
        first = kl_tuning.result(state)
        assert torch.equal(first.codes, origin.codes)
        assert torch.equal(first.scales, origin.scales)
        assert torch.equal(first.dequantize(), origin.dequantize())


def test_v_starts_at_the_offset_of_the_float_weight() -> None:
    scheme = WeightScheme(bits=4, group_size="channel", symmetric=False)
    origin = QuantizedTensor(
        torch.tensor([[3, 3, 3, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[1]]).short(), scheme
    )
    state = kl_tuning.start(origin, torch.tensor([[1.0, 1.1, 0.9, 7.0]]), RATES)
    assert state.rounding is not None
    torch.testing.assert_close(state.rounding.value, torch.tensor([[0.0, 0.2, -0.2, 0.49]]))


def test_a_transposed_float_weight_is_tuned_equally() -> None:
    weight, rates = random(24, 96), Rates(0.3, 0.0)
    quantized = rounded(weight, WeightScheme(4, 32, symmetric=True))
    one, other = (kl_tuning.start(quantized, w, rates) for w in (weight, weight.T.contiguous().T))
    for state in (one, other):
        kl_tuning.update(state, random(24, 96, seed=1), rates, 0)
    assert same(one, other)


def test_scales_in_the_range_of_float16_stay_in_it() -> None:
    scales = torch.tensor([[1e-4], [-1e-4]], dtype=torch.bfloat16)
    origin = QuantizedTensor(torch.ones(2, 4, dtype=torch.uint8), scales, None, WeightScheme(4, "channel"))
    tuned = kl_tuning.quantized(origin, None, torch.tensor([[-0.9], [-0.9]]))
    assert torch.equal(tuned.scales.to(torch.float16).to(torch.bfloat16), tuned.scales)
    assert float(tuned.scales.abs().min()) >= torch.finfo(torch.float16).smallest_normal
    assert tuned.scales[1] < 0


def test_scales_keep_their_sign_and_the_smallest_size() -> None:
    scheme = WeightScheme(bits=4, group_size="channel", symmetric=True)
    codes = torch.full((2, 4), 9, dtype=torch.uint8)
    origin = QuantizedTensor(codes, torch.tensor([[-0.25], [7e-5]], dtype=torch.float16), None, scheme)
    tuned = kl_tuning.quantized(origin, None, torch.tensor([[0.5], [-0.9]]))
    assert tuned.scales.dtype == torch.float16
    assert tuned.scales[0].item() == -0.375
    assert tuned.scales[1].item() >= 0.999 * SMALLEST_SCALE[torch.float16]


def test_a_code_at_its_limit_is_not_pushed_further() -> None:
    scheme = WeightScheme(bits=2, group_size="channel", symmetric=True)
    origin = QuantizedTensor(torch.tensor([[3, 0]], dtype=torch.uint8), torch.ones(1, 1), None, scheme)
    state = kl_tuning.start(origin, None, Rates(rounding=0.3, scales=0))
    outward = torch.tensor([[-1.0, 1.0]])
    for step in range(20):
        kl_tuning.update(state, outward, Rates(0.3, 0), step)
    assert state.rounding is not None
    # Only the momentum from inside the range is left: without the rule it would be 20 steps of 0.3.
    assert state.rounding.value.abs().max() < 3
    assert kl_tuning.result(state).codes.tolist() == [[3, 0]]
    for step in range(20, 60):
        kl_tuning.update(state, -outward, Rates(0.3, 0), step)
    assert kl_tuning.result(state).codes.tolist() == [[0, 3]]


@pytest.mark.parametrize(("rates", "moves"), [(Rates(0.1, 0), "codes"), (Rates(0, 0.1), "scales")])
def test_a_rate_of_zero_changes_nothing(rates: Rates, moves: str) -> None:
    origin = rounded(random(4, 32), SCHEMES[0])
    state = kl_tuning.start(origin, None, rates)
    for step in range(10):
        kl_tuning.update(state, random(4, 32, seed=3), rates, step)
    tuned = kl_tuning.result(state)
    assert torch.equal(tuned.codes, origin.codes) == (moves != "codes")
    assert torch.equal(tuned.scales, origin.scales) == (moves != "scales")
    assert len(kl_tuning.tensors(state)) == 3


def test_rates_rise_over_ten_steps_and_fall_to_zero() -> None:
    rates = [Rates(2.0, 1.0).at(step, 100) for step in range(101)]
    assert [round(rate.rounding, 6) for rate in rates[:2]] == [0.2, 2 * 0.2 * 0.99]
    assert rates[50] == Rates(1.0, 0.5)
    assert rates[100] == Rates(0, 0)
    assert max(rates, key=lambda rate: rate.scales) == rates[9]


def test_a_restored_state_continues_equally() -> None:
    origin = rounded(random(4, 32), SCHEMES[1])
    whole = kl_tuning.start(origin, random(4, 32), RATES)
    kl_tuning.update(whole, random(4, 32, seed=4), RATES, 0)
    copied = {name: tensor.clone() for name, tensor in kl_tuning.tensors(whole).items()}
    again = kl_tuning.restored(origin, copied)
    for state in (whole, again):
        kl_tuning.update(state, random(4, 32, seed=5), RATES, 1)
    assert same(whole, again)


def same(one: State, other: State) -> bool:
    first, second = kl_tuning.tensors(one), kl_tuning.tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_columns_may_have_a_group_index() -> None:
    plain = rounded(random(4, 32), SCHEMES[0])
    listed = QuantizedTensor(plain.codes, plain.scales, plain.zeros, plain.scheme, plain.column_groups().int())
    states = [kl_tuning.start(origin, None, RATES) for origin in (plain, listed)]
    for state in states:
        kl_tuning.update(state, random(4, 32, seed=6), RATES, 0)
    torch.testing.assert_close(states[0].scales.value, states[1].scales.value)  # type: ignore[union-attr]


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    weight = random(4, 16)
    origin = rounded(weight, SCHEMES[0])
    gradient = random(4, 16, seed=1)
    broken = gradient.clone()
    broken[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    zeroed = gradient.clone()
    zeroed[0, :3] = 0
    states = [kl_tuning.start(origin, weight, RATES) for _ in range(2)]
    for step in range(2):
        for state, slope in zip(states, (broken, zeroed), strict=True):
            kl_tuning.update(state, slope, RATES, step)
    assert same(*states)
