"""The op `llmq::w4a16_linear`: y = x Wᵀ + bias with W packed, as `reference.linear` defines it.

A custom op is opaque to torch.compile and to CUDA graphs: they see shapes through the fake and never the bit
arithmetic.  Arguments are checked once, here; a backend may rely on everything that `check` ensures.  `cpu.py` serves
every device; the kernel for one kind of device replaces it there by `w4a16_linear.register_kernel(device)`.

torch needs flat arguments: x and bias, then the fields of a `PackedWeight` in their order.

Adapters are trained, not packed weights: x gets a gradient, the arrays of the weight and the bias get none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from llmq_kernels import backend
from llmq_kernels.arguments import FLOATS, INDICES, described, listed, require
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import cpu, gpu, int4pack, int8pack, layout, small_batches
from llmq_kernels.w4a16.launches import Launches
from llmq_kernels.w4a16.packed_weight import PackedWeight

INT16, UINT8, INT8, BFLOAT16 = (torch.int16,), (torch.uint8,), (torch.int8,), (torch.bfloat16,)
WORDS = {bits: f"words of {bits} bits" for bits in layout.PLANES}  # made once: `check` runs in every call
DEVICES = ("cpu", "cuda")  # of other types no tensor is multiplied without torch's dispatcher, and none is cast


@torch.library.custom_op("llmq::w4a16_linear", mutates_args=())
def w4a16_linear(
    x: Tensor,
    bias: Tensor | None,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
    column_order: Tensor | None = None,
    cpu_words: Tensor | None = None,
    cpu_grid: Tensor | None = None,
) -> Tensor:
    """x (..., K) float16, bfloat16 or float32 -> (..., N) in the same dtype; bias (N,) float or None.

    The other arguments are those of `PackedWeight`.  Raises KernelInputError where `check` does.
    """
    weight = PackedWeight(words, scales, zeros, bits, in_features, columns_per_group, column_order, cpu_words, cpu_grid)
    return _on_torch(x, weight, bias)


def linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, launches: Launches | None = None) -> Tensor:
    """`w4a16_linear` as a layer calls it: through torch's dispatcher, except for plain inference.

    The dispatcher passes a custom op through several Python functions, for gradients, tracing and tensor subclasses.
    That takes 30 µs of CPU time, as long as the product of a small layer.  Where nothing is traced, recorded or
    differentiated they all do nothing, and are skipped.  Autocast casts x, as it does for torch's linear.

    `launches` belong to the layer, and save most of the remaining CPU time of calls on a GPU.
    """
    device = x.device.type
    if device in DEVICES:
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if is_plain_inference(x, bias):
            return _on_torch(x, weight, bias) if device == "cpu" else _eagerly_on_gpu(x, weight, bias, launches)
    product: Tensor = torch.ops.llmq.w4a16_linear(x, bias, *weight)
    return product


def _eagerly_on_gpu(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, launches: Launches | None) -> Tensor:
    known = launches.again(x, weight, bias) if launches is not None else None
    if known is not None:
        return known
    check(x, weight, bias)
    if backend.choose(x.device).name != "triton":
        return cpu.linear(x, weight, bias)
    return gpu.linear(x, weight, bias) if launches is None else launches.first(x, weight, bias)


def is_plain_inference(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a product of x is computed now, and nothing is traced, recorded or differentiated."""
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (trained and torch.is_grad_enabled())
        and torch._C._get_tracing_state() is None
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _on_torch(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    check(x, weight, bias)
    if weight.cpu_words is not None and 0 < x.numel() <= small_batches.choose(weight.bits).rows * weight.in_features:
        return small_batches.linear(x, weight, bias)
    return cpu.linear(x, weight, bias)


@w4a16_linear.register_kernel("cuda")
def _on_gpu(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    check(x, weight, bias)
    run = gpu.linear if backend.choose(x.device).name == "triton" else cpu.linear
    return run(x, weight, bias)


@torch.library.custom_op("llmq::w4a16_input_gradient", mutates_args=())
def w4a16_input_gradient(
    gradient: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    in_features: int,
    columns_per_group: int,
    column_order: Tensor | None = None,
) -> Tensor:
    """The gradient of `w4a16_linear` with respect to x: gradient (..., N) -> (..., K)."""
    weight = PackedWeight(words, scales, zeros, bits, in_features, columns_per_group, column_order)
    return cpu.input_gradient(gradient, weight)


@w4a16_input_gradient.register_kernel("cuda")
def _gradient_on_gpu(gradient: Tensor, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    run = gpu.input_gradient if backend.choose(gradient.device).name == "triton" else cpu.input_gradient
    return run(gradient, weight)


def check(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> None:
    """Raise KernelInputError unless the arguments are what `w4a16_linear` and `PackedWeight` document.

    All tensors are on x's device; all but x, which may have any strides, are contiguous.  Values are not read, because
    on a GPU that would stop the queue.
    """
    device = x.device
    N = check_weight(weight, bias, device)[0]
    _, _, _, bits, in_features, _, column_order, cpu_words, cpu_grid = weight
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != in_features:
        raise KernelInputError(f"x is {described(x)}, expected {listed(FLOATS)} (..., {in_features})")
    if column_order is not None:
        require("column_order", column_order, INDICES, (in_features,), device)
    if cpu_words is not None and cpu_grid is not None:
        if bits == 8:
            _check_int8_pair(cpu_words, cpu_grid, N, in_features, device)
            return
        pieces = cpu_grid.shape[0] if cpu_grid.dim() else 0
        require("cpu_words", cpu_words, UINT8, (N, in_features // 2), device)
        require("cpu_grid", cpu_grid, BFLOAT16, (pieces, N, 2), device)
        if in_features not in [pieces * group for group in int4pack.GROUPS]:
            raise KernelInputError(
                f"cpu_grid: found {pieces} pieces of {in_features} columns, expected 32 to 256 columns per piece"
            )
    elif cpu_words is not None or cpu_grid is not None:
        raise KernelInputError("cpu_words and cpu_grid: found one of them, expected both or neither")


def _check_int8_pair(words: Tensor, grid: Tensor, N: int, in_features: int, device: torch.device) -> None:
    require("cpu_words", words, INT8, (N, in_features), device)
    require("cpu_grid", grid, BFLOAT16, (N,), device)
    if in_features % int8pack.COLUMNS:
        raise KernelInputError(f"cpu_words: found {in_features} columns, expected a multiple of {int8pack.COLUMNS}")


def check_weight(
    weight: PackedWeight[Tensor], bias: Tensor | None, device: torch.device, *, stacked: bool = False
) -> tuple[int, ...]:
    """The shape of the rows, (N,) or for a stack of experts (E, N).

    Raises KernelInputError unless words, scales, zero points and bias fit each other and lie on `device`.
    """
    words, scales, zeros, bits, in_features, columns_per_group, _, _, _ = weight
    rows: tuple[int, ...]
    packed: tuple[int, ...]
    grid: tuple[int, ...]
    if in_features < 1 or columns_per_group < 1:
        raise KernelInputError(
            f"in_features is {in_features} and columns_per_group {columns_per_group}, expected at least 1 each"
        )
    per_row, G = layout.words_per_row(in_features, bits), -(-in_features // columns_per_group)
    if stacked:
        E, N = words.shape[:2] if words.dim() == 3 else (0, 0)
        rows, packed, grid = (E, N), (E, N, per_row), (E, G, N)
    else:
        N = words.shape[0] if words.dim() else 0
        rows, packed, grid = (N,), (N, per_row), (G, N)
    require(WORDS[bits], words, INT16, packed, device)
    require("scales", scales, FLOATS, grid, device)
    if zeros is not None:
        require("zeros", zeros, INT16, grid, device)
    if bias is not None:
        require("bias", bias, FLOATS, rows, device)
    return rows


@w4a16_linear.register_fake
def _shape_of_linear(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.words.shape[0])


@w4a16_input_gradient.register_fake
def _shape_of_gradient(gradient: Tensor, *fields: Any) -> Tensor:
    weight: PackedWeight[Tensor] = PackedWeight(*fields)
    return gradient.new_empty(*gradient.shape[:-1], weight.in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight: PackedWeight[Tensor] = PackedWeight(*inputs[2:])
    ctx.sizes = (weight.bits, weight.in_features, weight.columns_per_group)
    ctx.save_for_backward(weight.words, weight.scales, weight.zeros, weight.column_order)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 11
    *weight, column_order = ctx.saved_tensors
    return w4a16_input_gradient(gradient, *weight, *ctx.sizes, column_order), *[None] * 10


w4a16_linear.register_autograd(_backward, setup_context=_keep)
