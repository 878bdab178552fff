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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import cpu, gpu, int4pack, layout

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
AUTOCAST = ("cpu", "cuda")  # others have none, or none that torch can be asked about


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
    int4_words: Tensor | None = None,
    int4_grid: Tensor | None = None,
) -> Tensor:
    """x (..., K) float16, bfloat16 or float32 -> (..., N) in the same dtype.

    words        (N, Kp / 16 * bits) int16, from `layout.pack`
    scales       (G, N) float16, bfloat16 or float32, of any sign, G = ceil(K / columns_per_group)
    zeros        (G, N) int16, or None where every zero is 2**(bits - 1)
    bias         (N,) float, or None
    column_order (K,) int32 or int64, or None: column c of W multiplies x[..., column_order[c]]
    int4_words, int4_grid  the same weight from `int4pack.prepare`, or None: few rows on a CPU then run in bfloat16

    Raises KernelInputError where `check` does.
    """
    return _on_torch(
        x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group, int4_words, int4_grid
    )


def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
    int4_words: Tensor | None = None,
    int4_grid: Tensor | None = None,
) -> Tensor:
    """`w4a16_linear` as a layer calls it: the op, but for a CPU that only computes.

    On its way through torch's dispatcher a custom op passes several Python functions, for gradients, for tracing, for
    tensors of other kinds.  That takes 30 µs on a CPU, as long as a small layer's product.  Where nothing is traced,
    recorded or differentiated they all do nothing, and are left out.  Autocast casts x, as it does for torch's linear.
    """
    device = x.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    arguments = (
        x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group, int4_words, int4_grid,
    )  # fmt: skip
    if _is_plain_inference_on_cpu(x, bias):
        return _on_torch(*arguments)
    product: Tensor = torch.ops.llmq.w4a16_linear(*arguments)
    return product


def _is_plain_inference_on_cpu(x: Tensor, bias: Tensor | None) -> bool:
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not (trained and torch.is_grad_enabled())
        and torch._C._get_tracing_state() is None
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _on_torch(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
    int4_words: Tensor | None,
    int4_grid: Tensor | None,
) -> Tensor:
    check(x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group, int4_words, int4_grid)
    if int4_words is not None and int4_grid is not None and 0 < x.numel() <= int4pack.choose().rows * in_features:
        return int4pack.linear(x, bias, column_order, int4_words, int4_grid)
    return cpu.linear(
        x, words, scales, zeros, bias, column_order,
        bits=bits, in_features=in_features, columns_per_group=columns_per_group,
    )  # fmt: skip


@w4a16_linear.register_kernel("cuda")
def _on_gpu(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
    int4_words: Tensor | None = None,
    int4_grid: Tensor | None = None,
) -> Tensor:
    check(x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group, int4_words, int4_grid)
    run = gpu.linear if backend.choose(x.device).name == "triton" else cpu.linear
    return run(
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
    int4_words: Tensor | None = None,
    int4_grid: Tensor | None = None,
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
        raise KernelInputError(f"x is {described(x)}, expected {listed(FLOATS)} (..., {in_features})")
    per_row = layout.words_per_row(in_features, bits)
    N, G = words.shape[0] if words.dim() else 0, -(-in_features // columns_per_group)
    require(f"words of {bits} bits", words, (torch.int16,), (N, per_row), x.device)
    require("scales", scales, FLOATS, (G, N), x.device)
    if zeros is not None:
        require("zeros", zeros, (torch.int16,), (G, N), x.device)
    if bias is not None:
        require("bias", bias, FLOATS, (N,), x.device)
    if column_order is not None:
        require("column_order", column_order, INDICES, (in_features,), x.device)
    if int4_words is not None and int4_grid is not None:
        pieces = int4_grid.shape[0] if int4_grid.dim() else 0
        require("int4_words", int4_words, (torch.uint8,), (N, in_features // 2), x.device)
        require("int4_grid", int4_grid, (torch.bfloat16,), (pieces, N, 2), x.device)
        if in_features not in [pieces * group for group in int4pack.GROUPS]:
            raise KernelInputError(
                f"int4_grid: found {pieces} pieces of {in_features} columns, expected 32 to 256 each"
            )
    elif int4_words is not None or int4_grid is not None:
        raise KernelInputError("int4_words and int4_grid: found one of them, expected both or none")


def require(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise KernelInputError(f"{name}: found {described(tensor)}, expected {listed(dtypes)} {shape}")
    if tensor.device != device:
        raise KernelInputError(f"{name}: found on {tensor.device}, expected on {device} where x is")
    if not tensor.is_contiguous():
        raise KernelInputError(f"{name}: found strides {tensor.stride()} for shape {shape}, expected contiguous")


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def listed(dtypes: Sequence[torch.dtype]) -> str:
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
    int4_words: Tensor | None = None,
    int4_grid: Tensor | None = None,
) -> Tensor:
    check(x, words, scales, zeros, bias, column_order, bits, in_features, columns_per_group, int4_words, int4_grid)
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
    _, words, scales, zeros, _, column_order, *ctx.grid, _, _ = inputs
    ctx.save_for_backward(words, scales, zeros, column_order)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    return w4a16_input_gradient(gradient, *ctx.saved_tensors, *ctx.grid) if needed else None, *[None] * 10


w4a16_linear.register_autograd(_backward, setup_context=_keep)
