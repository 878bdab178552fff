"""The op `llmq::w4a16_linear`: y = x Wᵀ + bias with W packed, as `reference.linear` defines it.

A custom op is opaque to torch.compile and to CUDA graphs: they see shapes through the fake and never the bit
arithmetic.  Arguments are checked once, here; a backend may rely on all that `check` says.  The torch path of `cpu.py`
serves every device; a kernel for one kind of device takes over with `w4a16_linear.register_kernel(device)`.

Trained are adapters, not codes: x gets a gradient, the weight's tensors and the bias get none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import cpu, layout

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)


@torch.library.custom_op("llmq::w4a16_linear", mutates_args=())
def w4a16_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """x (..., K) float16, bfloat16 or float32 -> (..., N) in the same dtype.

    words        (N, Kp / 16 * bits) int16, from `layout.pack`
    scales       (G, N) float16, bfloat16 or float32, of any sign, G = ceil(K / columns_per_group)
    zeros        (G, N) int16, or None where every zero is 2**(bits - 1)
    bias         (N,) float, or None
    column_order (K,) int32 or int64, or None: column c of W multiplies x[..., column_order[c]]

    Raises KernelInputError where `check` does.
    """
    check(x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group)
    return cpu.linear(
        x, words, scales, zeros, bias, column_order,
        bits=bits, in_features=in_features, columns_per_group=columns_per_group,
    )  # fmt: skip


@torch.library.custom_op("llmq::w4a16_input_gradient", mutates_args=())
def w4a16_input_gradient(
    gradient: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """The gradient of `w4a16_linear` with respect to x: gradient (..., N) -> (..., K), the other arguments as there."""
    return cpu.input_gradient(
        gradient, words, scales, zeros, column_order,
        bits=bits, in_features=in_features, columns_per_group=columns_per_group,
    )  # fmt: skip


def check(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> None:
    """Raise KernelInputError unless the arguments are what `w4a16_linear` documents.

    All tensors are on x's device; all but x, which may have any strides, are contiguous.  Values are not read, because
    on a GPU that would stop the queue.
    """
    if in_features < 1 or columns_per_group < 1:
        raise KernelInputError(
            f"in_features is {in_features} and columns_per_group {columns_per_group}, expected at least 1 each"
        )
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != in_features:
        raise KernelInputError(f"x is {_described(x)}, expected {_listed(FLOATS)} (..., {in_features})")
    per_row = layout.words_per_row(in_features, bits)
    N, G = words.shape[0] if words.dim() else 0, -(-in_features // columns_per_group)
    _require(f"words of {bits} bits", words, (torch.int16,), (N, per_row), x.device)
    _require("scales", scales, FLOATS, (G, N), x.device)
    if zeros is not None:
        _require("zeros", zeros, (torch.int16,), (G, N), x.device)
    if bias is not None:
        _require("bias", bias, FLOATS, (N,), x.device)
    if column_order is not None:
        _require("column_order", column_order, INDICES, (in_features,), x.device)


def _require(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise KernelInputError(f"{name}: found {_described(tensor)}, expected {_listed(dtypes)} {shape}")
    if tensor.device != device:
        raise KernelInputError(f"{name}: found on {tensor.device}, expected on {device} where x is")
    if not tensor.is_contiguous():
        raise KernelInputError(f"{name}: found strides {tensor.stride()} for shape {shape}, expected contiguous")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))


@w4a16_linear.register_fake
def _shape_of_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    check(x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group)
    return x.new_empty(*x.shape[:-1], words.shape[0])


@w4a16_input_gradient.register_fake
def _shape_of_gradient(
    gradient: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scales, zeros, _, column_order, *ctx.grid = inputs
    ctx.save_for_backward(words, scales, zeros, column_order)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    return w4a16_input_gradient(gradient, *ctx.saved_tensors, *ctx.grid) if needed else None, *[None] * 8


w4a16_linear.register_autograd(_backward, setup_context=_keep)
