"""The launches of one layer on a GPU, kept between calls: decoding makes the same few calls again and again.

The first call of a layer with some number of rows is checked (`op.check`) and compiled.  Its launch is kept, and the
next call with as many rows allocates the output and launches the compiled kernel: no check, no plan, no choice of a
backend, and none of the work by which Triton finds the compiled kernel for its arguments.

A kept launch is used only if nothing differs that a kernel depends on:

* the arrays of the weight and the bias are the same objects at the same addresses, with the same dtype of the bias.
  A layer that is moved or loaded again has other ones, and starts again;
* x has the same dtype and number of rows, K columns, is contiguous, aligned, and on the same, current device.

All other calls take the way of a first call.  Above the crossover there is nothing to keep: those calls take long.

Counters and workspaces are those of `gpu.run_fused`.  Addresses are passed as numbers, which Triton accepts; it would
otherwise ask the driver about each of them.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq_kernels.w4a16 import counters, gpu
from llmq_kernels.w4a16.packed_weight import PackedWeight


class Launch(NamedTuple):
    """A compiled kernel for one number of rows; `run` takes its arguments and the stream.

    `weight` holds the addresses of words, scales, zeros and bias; where a layer has none, that of the words, which the
    kernel does not read.  `rest` are the arguments after M: sizes and constants, in the order of the kernel.
    """

    run: Callable[..., None]
    weight: tuple[int, int, int, int]
    rest: tuple[Any, ...]
    splits: int
    output_tiles: int


class Launches:
    """Starts empty, and so does a copy: compiled kernels belong to a process."""

    def __init__(self) -> None:
        # The arrays of the layer, as weak references: a layer that moves to another device frees its memory here.
        self._arrays: tuple[Callable[[], Tensor | None], ...] = (_none,) * 5
        self._addresses: tuple[Any, ...] = ()
        self._kept: dict[tuple[int, torch.dtype, torch.device], Launch] = {}

    def __reduce__(self) -> tuple[type["Launches"], tuple[()]]:
        return Launches, ()

    def again(self, x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor | None:
        """x (..., K) -> (..., N) by a kept launch; None if there is none for this call."""
        K = weight.in_features
        M = x.numel() // K
        launch = self._kept.get((M, x.dtype, x.device))
        if launch is None or not self._same(weight, bias) or not _is_plain(x, K):
            return None
        rows = x if weight.column_order is None else x.view(M, K).index_select(1, weight.column_order)
        out = torch.empty(*x.shape[:-1], weight.words.shape[0], dtype=x.dtype, device=x.device)
        words, scales, zeros, bias_address = launch.weight
        workspace = counts = words
        if launch.splits > 1:  # both tensors are held until the launch is queued
            space = torch.empty(launch.splits * out.numel(), dtype=torch.float32, device=x.device)
            counted = counters.zeroed(launch.output_tiles, x.device)
            workspace, counts = space.data_ptr(), counted.data_ptr()
        launch.run(
            rows.data_ptr(), words, scales, zeros, bias_address, out.data_ptr(), workspace, counts, M, *launch.rest,
            stream=counters.current_stream(x.device),
        )  # fmt: skip
        return out

    def first(self, x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
        """`gpu.linear`, keeping the launch if `again` can use it.  `op.check` accepted the arguments."""
        machine, N, K = gpu.machine_of(x.device), weight.words.shape[0], weight.in_features
        M = x.numel() // K
        fused = gpu.covers(x.dtype, weight) and 0 < M <= gpu.most_fused_rows(machine, weight) and N > 0
        if not fused or not _is_plain(x, K):
            return gpu.linear(x, weight, bias)
        rows = x.view(M, K)
        if weight.column_order is not None:
            rows = rows.index_select(1, weight.column_order)
        plan = gpu.cached_plan(machine, gpu.Product.of(M, weight, bias))
        out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
        compiled = gpu.run_fused(plan, rows, weight, bias, out.view(M, N))
        if compiled is not None:  # Triton's interpreter compiles nothing
            if not self._same(weight, bias):
                self._arrays, self._addresses, self._kept = _references(weight, bias), _addresses(weight, bias), {}
            self._kept[M, x.dtype, x.device] = _launch(plan, compiled, weight, bias)
        return out

    def _same(self, weight: PackedWeight[Tensor], bias: Tensor | None) -> bool:
        words, scales, zeros, column_order, same_bias = self._arrays
        return (
            words() is weight.words
            and scales() is weight.scales
            and zeros() is weight.zeros
            and column_order() is weight.column_order
            and same_bias() is bias
            and self._addresses == _addresses(weight, bias)
        )


def _is_plain(x: Tensor, K: int) -> bool:
    """Whether x (..., K) is as a new tensor on the current device: contiguous and aligned."""
    on_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return x.shape[-1] == K and x.is_contiguous() and on_current and x.data_ptr() % gpu.ALIGNMENT == 0


def _launch(plan: gpu.Plan, compiled: Any, weight: PackedWeight[Tensor], bias: Tensor | None) -> Launch:
    words, names = weight.words.data_ptr(), plan.kernel.arg_names
    zeros = words if weight.zeros is None else weight.zeros.data_ptr()
    sizes = (weight.words.shape[0], weight.in_features, weight.in_features)  # N, K, x_stride
    constants = tuple(plan.constants[name] for name in names[names.index("x_stride") + 1 :])
    addresses = (words, weight.scales.data_ptr(), zeros, words if bias is None else bias.data_ptr())
    return Launch(compiled[plan.grid], addresses, sizes + constants, plan.splits, plan.output_tiles)


def _none() -> None:
    """Refers to an array that a layer does not have."""


def _references(weight: PackedWeight[Tensor], bias: Tensor | None) -> tuple[Callable[[], Tensor | None], ...]:
    arrays = (weight.words, weight.scales, weight.zeros, weight.column_order, bias)
    return tuple(_none if array is None else weakref.ref(array) for array in arrays)


def _addresses(weight: PackedWeight[Tensor], bias: Tensor | None) -> tuple[Any, ...]:
    """What may change although the objects are the same: `tensor.data = other` gives a tensor another memory."""
    zeros = weight.zeros
    return (
        weight.words.data_ptr(),
        weight.scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if bias is None else (bias.data_ptr(), bias.dtype),
    )
