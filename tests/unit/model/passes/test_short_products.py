"""Products in bfloat16: the same gradients but for their rounding, and nothing stays changed."""

import pytest
import torch
from torch import Tensor, nn

from llmq.model.passes.short_products import SMALLEST, short_products

WIDTH = 256
assert WIDTH**2 >= SMALLEST
ROUNDING = 2**-8  # of bfloat16


def gradients(linear: nn.Linear, inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of its sum of squares in the inputs, the weight and the bias."""
    leaf = inputs.clone().requires_grad_(True)
    output = linear(leaf)
    return output.detach(), *torch.autograd.grad(output.square().sum(), (leaf, *linear.parameters()))


def test_outputs_and_gradients_are_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(WIDTH, WIDTH), torch.randn(2, 5, WIDTH)
    exact = gradients(linear, inputs)
    with short_products([linear], fast=True):
        short = gradients(linear, inputs)
    for one, other in zip(exact, short, strict=True):
        assert other.dtype == torch.float32
        assert 0 < float((one - other).norm() / one.norm()) < 2 * ROUNDING
    assert all(map(torch.equal, exact, gradients(linear, inputs)))


def test_a_forward_that_others_have_replaced_comes_back() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    replaced = linear.forward = lambda inputs: inputs  # type: ignore[method-assign]
    with short_products([linear], fast=True):
        assert linear.forward is not replaced
    assert linear.forward is replaced


@pytest.mark.parametrize("linear", [nn.Linear(16, 16), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)])
def test_small_layers_and_other_dtypes_stay(linear: nn.Linear) -> None:
    with short_products([linear], fast=True):
        assert "forward" not in vars(linear)


def test_slow_processors_keep_float32() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    with short_products([linear], fast=False):
        assert "forward" not in vars(linear)
