"""Gradients of a fake-quantized layer, against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.numerics import affine_grid
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GroupSize, InputScheme, WeightScheme
from llmq.training.fake_quantized import FakeQuantizedLinear

STEP = 1.0  # the loss is quadratic in a single value, so a central difference is exact, and a large one has no noise
N, K = 4, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(
    bits: int, *, symmetric: bool, group: GroupSize = 16, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    weight = random(N, K)
    grid = affine_grid.fit_minmax(weight, WeightScheme(bits, group, symmetric), dtype)
    return grid.quantized(grid.encode(weight))


def loss_of(layer: FakeQuantizedLinear) -> Tensor:
    return (layer(random(8, K, seed=1)) - random(8, N, seed=2)).square().mean()


def slope(loss: Callable[[], Tensor], values: Tensor, index: tuple[int, int], step: float) -> float:
    """The central difference of a loss at one of its values."""
    before = float(values[index])
    sides = []
    for sign in (1, -1):
        values[index] = before + sign * step
        sides.append(float(loss()))
    values[index] = before
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_scales_is_that_of_the_loss(bits: int, symmetric: bool) -> None:
    """With float32 scales nothing is rounded between θ and the loss, so this is a plain derivative."""
    layer = FakeQuantizedLinear(rounded(bits, symmetric=symmetric), random(N, K), random(N, seed=3))
    loss_of(layer).backward()
    assert layer.stretch.grad is not None
    with torch.no_grad():
        for index in ((0, 0), (2, 1), (3, 0)):
            expected = slope(lambda: loss_of(layer), layer.stretch, index, STEP / 2)
            assert float(layer.stretch.grad[index]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_of_values_is_that_of_the_loss_without_rounding(bits: int) -> None:
    """Straight through: the derivative of the loss where v moves the weight by steps of its scale, unrounded."""
    layer = FakeQuantizedLinear(rounded(bits, symmetric=False), random(N, K), None)
    loss_of(layer).backward()
    assert layer.offset.grad is not None
    weight, scales = layer.weight.detach().clone(), layer.origin.scales[:, layer.origin.column_groups()]
    moved = torch.zeros(N, K)

    def unrounded() -> Tensor:
        outputs = torch.nn.functional.linear(random(8, K, seed=1), weight + scales * moved)
        return (outputs - random(8, N, seed=2)).square().mean()

    for index in ((0, 0), (1, 17), (3, 31)):
        expected = slope(unrounded, moved, index, STEP)
        assert float(layer.offset.grad[index]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_gradient_of_the_input_and_the_bias() -> None:
    layer = FakeQuantizedLinear(rounded(3, symmetric=True), None, random(N, seed=3))
    inputs = random(8, K, seed=1).requires_grad_(True)
    (layer(inputs) * random(8, N, seed=2)).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, random(8, N, seed=2) @ layer.weight.detach())


def test_inputs_are_rounded_as_the_file_declares() -> None:
    layer = FakeQuantizedLinear(rounded(4, symmetric=True), None, None, InputScheme("int8", "dynamic"))
    inputs = random(8, K, seed=1).requires_grad_(True)
    outputs = layer(inputs)
    assert torch.equal(outputs, rounding_for(InputScheme("int8", "dynamic"))(inputs.detach()) @ layer.weight.T)
    outputs.sum().backward()  # straight through
    assert inputs.grad is not None and torch.allclose(inputs.grad, layer.weight.detach().sum(0).expand(8, K))


def test_values_out_of_range_are_not_pushed_further() -> None:
    layer = FakeQuantizedLinear(rounded(2, symmetric=True), None, None)
    with torch.no_grad():
        layer.offset.fill_(10.0)
    (layer.weight * layer.origin.scales[:, layer.origin.column_groups()]).sum().neg().backward()  # upwards: no gradient
    assert layer.offset.grad is not None and not layer.offset.grad.any()
    layer.offset.grad = None
    (layer.weight * layer.origin.scales[:, layer.origin.column_groups()]).sum().backward()  # back into the range
    assert bool((layer.offset.grad > 0).all())


def test_start_has_the_codes_of_the_file_wherever_the_float_weight_is() -> None:
    start = rounded(2, symmetric=True)
    layer = FakeQuantizedLinear(start, 5 * random(N, K, seed=9), None)
    assert torch.equal(layer.quantized().codes, start.codes) and torch.equal(layer.weight, start.dequantize())
    assert float(layer.offset.detach().abs().max()) == pytest.approx(0.49)


def test_one_scale_for_the_weight_is_not_trained() -> None:
    layer = FakeQuantizedLinear(rounded(8, symmetric=True, group="tensor"), None, None)
    assert not layer.stretch.requires_grad
    loss_of(layer).backward()
    assert layer.offset.grad is not None and layer.stretch.grad is None
