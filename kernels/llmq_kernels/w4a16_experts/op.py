"""The op `llmq::w4a16_experts`: rows of x, each times the packed weight of one expert, as `reference.experts` defines.

Arguments are checked once, here; a backend may rely on everything that `check` ensures.  On CUDA, the 4-bit weights
that `gpu.covers` accepts run in Triton; everything else runs in torch (`cpu.py`), on any device.

x gets a gradient, the weights and the bias get none.
"""

from typing import Any

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.arguments import FLOATS, INDICES, described, listed, require
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16.op import check_weight
from llmq_kernels.w4a16.packed_weight import PackedWeight
from llmq_kernels.w4a16_experts import cpu, gpu


@torch.library.custom_op("llmq::w4a16_experts", mutates_args=())
def w4a16_experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    bias: Tensor | None,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """x (M, K) float16, bfloat16 or float32 -> (P, N) in the same dtype: row token[p] of x times weight expert[p].

    token   (P,) int32 or int64 in [0, M)
    expert  (P,) int32 or int64 in [0, E)
    bias    (E, N) float, or None

    The other arguments are those of a stacked `PackedWeight`.  Raises KernelInputError where `check` does, and on a CPU
    for an index out of range.
    """
    weight = PackedWeight(words, scales, zeros, bits, in_features, columns_per_group)
    check(x, token, expert, weight, bias)
    if x.device.type == "cpu":  # elsewhere, reading values would stop the queue
        _require_below("token", token, x.shape[0])
        _require_below("expert", expert, words.shape[0])
    if backend.choose(x.device).name == "triton" and gpu.covers(x, weight):
        return gpu.experts(x, token, expert, weight, bias)
    return cpu.experts(x, token, expert, weight, bias)


@torch.library.custom_op("llmq::w4a16_experts_input_gradient", mutates_args=())
def w4a16_experts_input_gradient(
    gradient: Tensor,
    token: Tensor,
    expert: Tensor,
    rows: int,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """The gradient of `w4a16_experts` with respect to x (M = rows, K), from that of its result, (P, N)."""
    weight = PackedWeight(words, scales, zeros, bits, in_features, columns_per_group)
    return cpu.input_gradient(gradient, token, expert, weight, rows)


def check(x: Tensor, token: Tensor, expert: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> None:
    """Raise KernelInputError unless the arguments are what `w4a16_experts` documents.

    All tensors are on x's device; all but x, which may have any strides, are contiguous.  Values are not read.
    """
    check_weight(weight, bias, x.device, stacked=True)
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != weight.in_features:
        raise KernelInputError(f"x is {described(x)}, expected {listed(FLOATS)} (M, {weight.in_features})")
    if token.dim() != 1:
        raise KernelInputError(f"token is {described(token)}, expected {listed(INDICES)} (P,)")
    require("token", token, INDICES, (token.shape[0],), x.device)
    require("expert", expert, INDICES, (token.shape[0],), x.device)


def _require_below(name: str, index: Tensor, limit: int) -> None:
    """Every index lies in [0, limit)."""
    low, high = (int(bound) for bound in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= limit:
        raise KernelInputError(f"{name}: found {low} to {high}, expected 0 to {limit - 1}")


@w4a16_experts.register_fake
def _shape_of_experts(x: Tensor, token: Tensor, expert: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    check(x, token, expert, weight, bias)
    return x.new_empty(token.shape[0], weight.words.shape[1])


@w4a16_experts_input_gradient.register_fake
def _shape_of_gradient(gradient: Tensor, token: Tensor, expert: Tensor, rows: int, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    return gradient.new_empty(rows, weight.in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, token, expert, _, words, scales, zeros, *ctx.sizes = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(token, expert, words, scales, zeros)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 10
    token, expert, *weight = ctx.saved_tensors
    return w4a16_experts_input_gradient(gradient, token, expert, ctx.rows, *weight, *ctx.sizes), *[None] * 9


w4a16_experts.register_autograd(_backward, setup_context=_keep)
