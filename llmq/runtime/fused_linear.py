"""Fuse layers with the same input into one product: q, k and v; gate and up.

One product with the rows of all layers is faster than one product per layer: there are fewer launches, and a GPU is
better utilized. No names of layers are used. A run of the model on the meta device, which costs nothing, shows which
layers share an input (`shared_inputs`). Their rows are stacked in one `PackedLinear` (`fuse_rows`), and each layer
becomes a `FusedLinear`: the first layer multiplies x with all rows, and when the other layers are called with the same
x, they take their part of the waiting product.

**A wrong guess costs time, but never changes the result.** The meta run decides which layers are stacked. At every call
x decides whether a layer uses the waiting product: x must be the same object, not modified since, in the same mode of
autograd. Otherwise a layer multiplies x with its own rows. The product is freed by its last reader. A product that is
never fetched is kept, with its x, until the first layer runs again.

`torch.compile(fullgraph=True)` can trace this, because it uses only attributes of a module and `is`; the graph has one
product per group. In inference mode and under torch.compile there is no version counter that shows whether x was
modified between two layers. The meta run then is the proof: if the code of the model modified x, the layers would not
be stacked. A hook that modifies x *in place* between q and k, in one of these two modes, is not detected.

In a `state_dict` the rows of a group appear under the name of each of its layers (`….q_proj.stack.rows.words`,
`….k_proj.stack.rows.words`), as one tensor in memory, like tied weights. `FusedLinear.quantized` returns the weight of
each layer exactly.

Not supported: sharing across modules with other layers between them, and use by several threads at once.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmq.model.analyse import meta_run
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.runtime.packed_linear import PackedLinear, PackedRows
from llmq.runtime.weight_view import WeightView
from llmq_kernels.w4a16 import op as packed
from llmq_kernels.w4a16.packed_weight import PackedWeight

logger = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """The product of x (..., K) with all rows of a stack; the positions of the layers that have not used it yet."""

    x: Tensor
    state: tuple[Any, ...]
    product: Tensor
    positions: tuple[int, ...]


class Stack(nn.Module):
    """The rows of several layers, and the product that waits for them."""

    def __init__(self, rows: PackedRows, members: int) -> None:
        super().__init__()
        self.rows = rows
        self._others = tuple(range(1, members))
        self._waiting: Waiting | None = None

    def start(self, x: Tensor) -> Tensor:
        """Compute the product of x (..., K) with all rows, (..., N of all), and keep it for the other layers."""
        product: Tensor = self.rows(x)
        self._waiting = Waiting(x, _state(x), product, self._others)
        return product

    def take(self, position: int, x: Tensor) -> Tensor | None:
        """The waiting product, once per layer; None if there is none for this x."""
        waiting = self._waiting
        if waiting is None or waiting.x is not x or position not in waiting.positions or waiting.state != _state(x):
            return None
        remaining = tuple(other for other in waiting.positions if other != position)
        self._waiting = Waiting(x, waiting.state, waiting.product, remaining) if remaining else None
        return waiting.product

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a saved module, starts without a waiting product."""
        return {**self.__dict__, "_waiting": None}


class FusedLinear(nn.Linear):
    """y = x Wᵀ + bias with W the rows `start` to `stop` of a stack; replaces a `PackedLinear`."""

    def __init__(self, layer: PackedLinear, stack: Stack, position: int, start: int) -> None:
        nn.Module.__init__(self)  # not nn.Linear.__init__, which creates a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scheme, self.columns_per_group = layer.scheme, layer.columns_per_group
        self.stack = stack
        self.start, self.stop = start, start + layer.out_features
        self._position = position
        self._has_zeros, self._has_bias = layer.zeros is not None, layer.bias is not None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See `PackedLinear.weight`."""
        return WeightView.of(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `PackedLinear.compute_dtype`."""
        return self.stack.rows.compute_dtype

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(N,), the part of this layer."""
        bias = self.stack.rows.bias
        return bias[self.start : self.stop] if self._has_bias and bias is not None else None

    def forward(self, input: Tensor) -> Tensor:
        x = input  # named as in nn.Linear, so that it can be given by its keyword
        product = self.stack.start(x) if self._position == 0 else self.stack.take(self._position, x)
        return self._alone(x) if product is None else product[..., self.start : self.stop]

    def _alone(self, x: Tensor) -> Tensor:
        """The product with the rows of this layer only: contiguous words, but strided columns of the scales."""
        rows, own = self.stack.rows, slice(self.start, self.stop)
        if rows.rounding is not None:
            x = rows.rounding(x)
        zeros = rows.zeros[:, own].contiguous() if self._has_zeros and rows.zeros is not None else None
        weight = PackedWeight(
            rows.words[own], rows.scales[:, own].contiguous(), zeros,
            rows.scheme.bits, rows.in_features, rows.columns_per_group, rows.column_order,
        )  # fmt: skip
        return packed.linear(x, weight, self.bias)

    def quantized(self) -> QuantizedTensor:
        """The original weight of the layer, exactly."""
        own = self.stack.rows.quantized(slice(self.start, self.stop))
        return replace(own, scheme=self.scheme, zeros=own.zeros if self._has_zeros else None)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {self.scheme}, rows {self.start} to {self.stop}"


def _state(x: Tensor) -> tuple[Any, ...]:
    """The state of x that must not change between two layers that share a product."""
    autograd = (torch.is_grad_enabled(), x.requires_grad)
    if torch.compiler.is_compiling():
        return autograd
    return (*autograd, torch.is_inference_mode_enabled(), None if x.is_inference() else x._version)


def fuse_rows(model: nn.Module, paths: Sequence[str]) -> None:
    """Stack the packed layers at `paths`, which share an input, if their grids agree.

    Grids agree if bits, columns per group, dtype of scales, order of columns and quantization of inputs are equal.
    While the rows are copied, the layers at `paths` are in memory twice.
    """
    alike: list[list[str]] = []
    for path in paths:
        group = next((group for group in alike if _agree(_packed(model, group[0]), _packed(model, path))), None)
        if group is None:
            alike.append([path])
        else:
            group.append(path)
    for group in alike:
        if len(group) > 1:
            _fuse_alike(model, group)


def _fuse_alike(model: nn.Module, paths: Sequence[str]) -> None:
    layers = [_packed(model, path) for path in paths]
    stack, start = Stack(PackedRows.stacked(layers), len(layers)), 0
    for position, (path, layer) in enumerate(zip(paths, layers, strict=True)):
        model.set_submodule(path, FusedLinear(layer, stack, position, start))
        start += layer.out_features


def _packed(model: nn.Module, path: str) -> PackedLinear:
    layer = model.get_submodule(path)
    if not isinstance(layer, PackedLinear):
        raise TypeError(f"{path} is a {type(layer).__name__}, expected a PackedLinear")
    return layer


def _agree(a: PackedLinear, b: PackedLinear) -> bool:
    one, other = a.column_order, b.column_order
    if _grid(a) != _grid(b) or (one is None) != (other is None):
        return False
    return one is None or other is None or torch.equal(one, other)


def _grid(layer: PackedLinear) -> tuple[Any, ...]:
    same = (layer.inputs, layer.columns_per_group, layer.scales.dtype, layer.words.device)
    return layer.scheme.bits, layer.in_features, *same


# ---- which layers share an input


@dataclass(frozen=True)
class _Call:
    path: str
    x: Tensor  # kept alive, so that no later tensor has its identity
    version: int
    out_features: int


def shared_inputs(model: nn.Module, paths: Collection[str]) -> list[list[str]]:
    """Find the layers of `paths` that run one after the other on the same tensor, as groups of two or more layers.

    `model` is on the meta device except for its buffers, and is not changed. It runs twice on a few tokens, the second
    time with outputs that are columns of a wider tensor, as fused layers return them; groups that fail with these are
    left out. A module that does not run on meta is skipped. Layers that were not reached are in no group, and a warning
    is logged.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    calls, failures = _recorded_calls(model, layers, {})
    missed = set(paths) - {call.path for call in calls}
    if missed and failures:
        path, error = next(iter(failures.items()))
        logger.warning(
            "%d of %d layers are not fused: %s does not run on the meta device (%s)",
            len(missed), len(layers), path or type(model).__name__, str(error).partition("\n")[0],
        )  # fmt: skip
    groups = _groups(calls)
    features = {call.path: call.out_features for call in calls}
    widths = {path: sum(features[member] for member in group) for group in groups for path in group}
    _, with_slices = _recorded_calls(model, layers, widths)
    refused = with_slices.keys() - failures.keys()
    return [group for group in groups if not any(_inside(path, group) for path in refused)]


def _groups(calls: Sequence[_Call]) -> list[list[str]]:
    groups: list[list[str]] = []
    placed: set[str] = set()
    last: _Call | None = None
    for call in calls:
        if call.path in placed:
            continue
        placed.add(call.path)
        if last is not None and call.x is last.x and call.version == last.version:
            groups[-1].append(call.path)
        else:
            groups.append([call.path])
        last = call
    return [group for group in groups if len(group) > 1]


def _inside(path: str, group: Sequence[str]) -> bool:
    return not path or any(member.startswith(f"{path}.") for member in group)


def _recorded_calls(
    model: nn.Module, layers: Mapping[str, nn.Module], widths: Mapping[str, int]
) -> tuple[list[_Call], dict[str, Exception]]:
    """Run the model on meta; return the calls of `layers` in order, and the modules that failed.

    The output of a layer in `widths` is some columns of a tensor with that width.
    """
    calls: list[_Call] = []

    def hook(path: str) -> Callable[..., Tensor | None]:
        def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            calls.append(_Call(path, args[0], args[0]._version, output.shape[-1]))
            if path not in widths:
                return None
            return output.new_empty(*output.shape[:-1], widths[path])[..., : output.shape[-1]]

        return record

    hooks = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        failures = meta_run.run(model, guess=False)
    finally:
        for handle in hooks:
            handle.remove()
    return calls, failures
