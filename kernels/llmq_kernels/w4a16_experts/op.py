"""The op `llmq::w4a16_experts`: rows of x, each times the packed weight of one expert, as `reference.experts` says.

Arguments are checked once, here; a backend may rely on all that `check` says.  On CUDA, 4-bit weights of the groupings
that `gpu.covers` names run in Triton; everything else runs in torch (`cpu.py`), on whatever device it lies.

x gets a gradient, the weights and the bias get none.
"""

from typing import Any

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16.op import FLOATS, INDICES, described, listed, require
from llmq_kernels.w4a16_experts import cpu, gpu


@torch.library.custom_op("llmq::w4a16_experts", mutates_args=())
def w4a16_experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """x (M, K) float16, bfloat16 or float32 -> (P, N) in the same dtype: row token[p] of x times weight expert[p].

    token   (P,) int32 or int64 in [0, M)
    expert  (P,) int32 or int64 in [0, E)
    words   (E, N, Kp / 16 * bits) int16, each expert's from `w4a16.layout.pack`
    scales  (E, G, N) float16, bfloat16 or float32, of any sign, G = ceil(K / columns_per_group)
    zeros   (E, G, N) int16, or None where every zero is 2**(bits - 1)
    bias    (E, N) float, or None

    Raises KernelInputError where `check` does, and on a CPU for an index out of range.
    """
    check(x, token, expert, words, scales, zeros, bias, bits, in_features, columns_per_group)
    if x.device.type == "cpu":  # elsewhere, reading values would stop the queue
        _require_below("token", token, x.shape[0])
        _require_below("expert", expert, words.shape[0])
    on_gpu = backend.choose(x.device).name == "triton" and gpu.covers(
        x, bits=bits, in_features=in_features, columns_per_group=columns_per_group
    )
    run = gpu.experts if on_gpu else cpu.experts
    return run(
        x, token, expert, words, scales, zeros, bias,
        bits=bits, in_features=in_features, columns_per_group=columns_per_group,
    )  # fmt: skip


@torch.library.custom_op("llmq::w4a16_experts_input_gradient", mutates_args=())
def w4a16_experts_input_gradient(
    gradient: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """The gradient of `w4a16_experts` with respect to x (M = rows, K), from that of its result, (P, N)."""
    return cpu.input_gradient(
        gradient, token, expert, words, scales, zeros,
        rows=rows, bits=bits, in_features=in_features, columns_per_group=columns_per_group,
    )  # fmt: skip


def check(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> None:
    """Raise KernelInputError unless the arguments are what `w4a16_experts` documents.

    All tensors are on x's device; all but x, which may have any strides, are contiguous.  Values are not read.
    """
    if in_features < 1 or columns_per_group < 1:
        raise KernelInputError(
            f"in_features is {in_features} and columns_per_group {columns_per_group}, expected at least 1 each"
        )
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != in_features:
        raise KernelInputError(f"x is {described(x)}, expected {listed(FLOATS)} (M, {in_features})")
    if token.dim() != 1:
        raise KernelInputError(f"token is {described(token)}, expected {listed(INDICES)} (P,)")
    per_row, G = layout.words_per_row(in_features, bits), -(-in_features // columns_per_group)
    E, N = words.shape[:2] if words.dim() == 3 else (0, 0)
    require("token", token, INDICES, (token.shape[0],), x.device)
    require("expert", expert, INDICES, (token.shape[0],), x.device)
    require(f"words of {bits} bits", words, (torch.int16,), (E, N, per_row), x.device)
    require("scales", scales, FLOATS, (E, G, N), x.device)
    if zeros is not None:
        require("zeros", zeros, (torch.int16,), (E, G, N), x.device)
    if bias is not None:
        require("bias", bias, FLOATS, (E, N), x.device)


def _require_below(name: str, index: Tensor, limit: int) -> None:
    """Every index lies in [0, limit)."""
    low, high = (int(bound) for bound in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= limit:
        raise KernelInputError(f"{name}: found {low} to {high}, expected 0 to {limit - 1}")


@w4a16_experts.register_fake
def _shape_of_experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    check(x, token, expert, words, scales, zeros, bias, bits, in_features, columns_per_group)
    return x.new_empty(token.shape[0], words.shape[1])


@w4a16_experts_input_gradient.register_fake
def _shape_of_gradient(
    gradient: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    return gradient.new_empty(rows, in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, token, expert, words, scales, zeros, _, *ctx.grid = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(token, expert, words, scales, zeros)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 10
    return w4a16_experts_input_gradient(gradient, *ctx.saved_tensors, ctx.rows, *ctx.grid), *[None] * 9


w4a16_experts.register_autograd(_backward, setup_context=_keep)
