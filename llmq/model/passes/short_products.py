"""Linear layers that multiply in bfloat16, on processors that do so faster than in float32.

For gradients only: over many steps and tokens the errors of 2⁻⁹ in single products average out. Everything else of a
block, the sums within products, and the losses on validation text stay in float32. On a GPU models run in 16 bits in
any case.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

SMALLEST = 2**15  # entries of a weight; for smaller ones the conversion takes longer than the product


@contextmanager
def short_products(linears: Iterable[nn.Module], *, fast: bool | None = None) -> Iterator[None]:
    """While open, large linear layers in float32 on a CPU multiply in bfloat16, and so do their gradients.

    Inputs, outputs and gradients are float32 outside of the products. `fast` says whether the processor multiplies
    bfloat16 faster; None: ask it.
    """
    chosen = is_fast() if fast is None else fast
    shortened = [linear for linear in linears if chosen and isinstance(linear, nn.Linear) and _fits(linear)]
    replaced = [vars(linear).get("forward") for linear in shortened]  # by others, see `replay.py`
    for linear in shortened:
        linear.forward = partial(_multiply, linear)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear, forward in zip(shortened, replaced, strict=True):
            if forward is None:
                del linear.forward  # that of the class is called again
            else:
                linear.forward = forward  # type: ignore[method-assign]


def is_fast() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _fits(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        type(linear) is nn.Linear  # its subclasses may do more
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= SMALLEST
    )


def _multiply(linear: nn.Linear, inputs: Tensor) -> Tensor:
    weight, bias = (None if tensor is None else tensor.to(torch.bfloat16) for tensor in (linear.weight, linear.bias))
    assert weight is not None
    return nn.functional.linear(inputs.to(torch.bfloat16), weight, bias).to(torch.float32)
