"""Packed experts: two calls of one op replace the two stacked float parameters of transformers.

transformers holds the experts of a layer in one module with 3-D parameters. `model/experts/stacking.py` knows its
structure, and where its weights are in a checkpoint. A `PackedExperts` replaces such a module with the same interface,
and uses the activation of the module: this file does not depend on any model.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError, listed
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.experts.routed import RoutedExperts
from llmq.model.experts.stacking import Form, Stacking, activate, form_of
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16_experts import op as _op  # noqa: F401  (registers llmq::w4a16_experts)

Read = Callable[[str], QuantizedTensor]


class PackedStack(nn.Module):
    """One linear layer of every expert: row token[p] of x times W[expert[p]]ᵀ, plus bias[expert[p]].

    W (E, N, K) is held as `words` (E, N, Kp / 16 * bits) int16, scales (E, G, N), zeros (E, G, N) or None.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        stacking: Stacking,
        read: Read,
        bias: Tensor | None,
        device: torch.device,
        inputs: Callable[[str], InputScheme | None] = lambda name: None,
    ) -> None:
        """`read` returns the parts by name, one expert after the other; bias is (E, N) or None.

        `inputs` returns how the inputs of a part are quantized, by its name.
        Raises FormatError for parts that differ in anything but their rows.
        """
        super().__init__()
        self.inputs = _common_inputs(stacking, inputs)
        self.rounding = None if self.inputs is None else rounding_for(self.inputs)
        self.stacking = stacking
        first = read(stacking.names[0][0])
        self.scheme, self.in_features = first.scheme, first.shape[1]
        self.columns_per_group = first.scheme.columns_per_group(self.in_features)
        E, N, G = len(stacking.names), sum(len(rows) for rows in stacking.rows), first.scales.shape[1]
        per_row = layout.words_per_row(self.in_features, self.scheme.bits)
        self.register_buffer("words", torch.empty(E, N, per_row, dtype=torch.int16, device=device))
        self.register_buffer("scales", torch.empty(E, G, N, dtype=first.scales.dtype, device=device))
        zeros = None if first.zeros is None else torch.empty(E, G, N, dtype=torch.int16, device=device)
        self.register_buffer("zeros", zeros)
        self.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)
        for e, names in enumerate(stacking.names):
            for name, rows in zip(names, stacking.rows, strict=True):
                part = read(name)
                _require_alike(name, part, stacking.names[0][0], first, len(rows))
                self._put(e, rows, part)

    def forward(self, x: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """x (M, K), token (P,) and expert (P,) int -> (P, N)."""
        if self.rounding is not None:
            x = self.rounding(x)
        product: Tensor = torch.ops.llmq.w4a16_experts(
            x, token, expert, self.bias, self.words, self.scales, self.zeros,
            self.scheme.bits, self.in_features, self.columns_per_group,
        )  # fmt: skip
        return product

    def quantized(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """Yield `(name, weight)` for every part of every expert, exactly as given to the constructor."""
        for e, names in enumerate(self.stacking.names):
            for name, rows in zip(names, self.stacking.rows, strict=True):
                rows = rows.to(self.words.device)
                codes = layout.unpack(self.words[e][rows], self.scheme.bits, self.in_features)
                zeros = None if self.zeros is None else self.zeros[e][:, rows].T.contiguous()
                yield name, QuantizedTensor(codes, self.scales[e][:, rows].T.contiguous(), zeros, self.scheme)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedStack":
        """Move or cast the module, except that scales, which must stay exact, are never cast: they pass as integers."""
        dtype = self.scales.dtype
        self.scales = self.scales.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self.scales.view(dtype)
        return self

    def _put(self, e: int, rows: Tensor, part: QuantizedTensor) -> None:
        device = self.words.device
        rows = rows.to(device)
        self.words[e][rows] = layout.pack(part.codes.to(device), self.scheme.bits)
        self.scales[e][:, rows] = part.scales.T.to(device)
        if self.zeros is not None and part.zeros is not None:
            self.zeros[e][:, rows] = part.zeros.T.to(device)

    def extra_repr(self) -> str:
        E, N, _ = self.words.shape
        return f"experts={E}, in_features={self.in_features}, out_features={N}, {self.scheme}"


class PackedExperts(RoutedExperts):
    """The experts of one layer, with the interface of transformers.

    `experts` is the module of transformers and `form` its structure by `form_of`. `up` and `down` replace its weights
    and biases.
    """

    def __init__(self, experts: nn.Module, form: Form, up: PackedStack, down: PackedStack) -> None:
        super().__init__(form, len(up.words))
        self.experts = without(experts, form.parameters)
        self.up = up
        self.down = down

    def run(self, hidden: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """See `RoutedExperts.run`."""
        experts: Any = self.experts
        inner = activate(experts, self.form, self.up(hidden, token, expert))  # (P, N)
        outer: Tensor = self.down(inner, torch.arange(len(expert), device=expert.device), expert)  # (P, K)
        return experts.post_expert_norm(outer) if getattr(experts, "has_post_expert_norm", False) else outer

    def quantized(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """Yield `(name, weight)` for every part of every expert, exactly as given to the constructor."""
        yield from self.up.quantized()
        yield from self.down.quantized()


def without(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A shallow copy of a module without some parameters."""
    copied, left_out = copy.copy(module), set(names)
    copied._parameters = {name: value for name, value in module._parameters.items() if name not in left_out}
    return copied


def pack_experts(
    path: str,
    experts: nn.Module,
    stackings: Sequence[Stacking],
    packed: PackedWeights,
    weights: ModelWeights,
    device: torch.device,
) -> PackedExperts:
    """The packed replacement of the experts at `path`, a module on meta; its other parameters are filled."""
    form = require_form(experts)
    rest = without(experts, form.parameters)
    weights.fill(path, rest, device)
    stacks = []
    for name, stacking in zip(form.stacked, stackings, strict=True):
        bias = _bias(path, experts, form, name, stacking, weights, device) if form.biased else None
        stack = PackedStack(stacking, packed.read, bias, device, packed.inputs)
        _require_shape(f"{path}.{name}", (*stack.words.shape[:2], stack.in_features), form.shape(experts, name))
        stacks.append(stack)
    return PackedExperts(rest, form, *stacks)


def fill_experts(
    path: str,
    experts: nn.Module,
    stackings: Sequence[Stacking],
    weights: ModelWeights,
    device: torch.device,
) -> None:
    """Fill a module of experts on meta with the float weights that the checkpoint stores separately."""
    form = require_form(experts)
    rest = without(experts, form.parameters)
    weights.fill(path, rest, device)
    filled: dict[str, Tensor] = {}
    for name, stacking in zip(form.stacked, stackings, strict=True):
        parameter = experts.get_parameter(name)
        filled[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        by_row = filled[name].mT if form.transposed else filled[name]  # (E, N, K)
        N = sum(len(rows) for rows in stacking.rows)
        shape = (len(stacking.names), N, by_row.shape[2])
        _require_shape(f"{path}.{name}", shape, form.shape(experts, name))
        for e, names in enumerate(stacking.names):
            for part, rows in zip(names, stacking.rows, strict=True):
                by_row[e][rows.to(device)] = weights.original(f"{part}.weight").to(device, parameter.dtype)
        if form.biased:
            filled[f"{name}_bias"] = _bias(path, experts, form, name, stacking, weights, device)
    experts._parameters.update(rest._parameters)
    experts._parameters.update({name: nn.Parameter(value, requires_grad=False) for name, value in filled.items()})


def _bias(
    path: str,
    experts: nn.Module,
    form: Form,
    name: str,
    stacking: Stacking,
    weights: ModelWeights,
    device: torch.device,
) -> Tensor:
    """The bias (E, N) of a stacked weight, which the checkpoint stores stacked or separately for each part."""
    parameter = experts.get_parameter(f"{name}_bias")
    if weights.stored_name(f"{path}.{name}_bias") is not None:
        return weights.original(f"{path}.{name}_bias").to(device, parameter.dtype)
    return stacked_bias(stacking, parameter, device, lambda part: weights.original(f"{part}.bias"))


def stacked_bias(stacking: Stacking, like: Tensor, device: torch.device, read: Callable[[str], Tensor]) -> Tensor:
    """The bias (E, N) in the shape and dtype of `like`, from the biases of the parts, which `read` returns by name."""
    bias = torch.empty(like.shape, dtype=like.dtype, device=device)
    for e, names in enumerate(stacking.names):
        for part, rows in zip(names, stacking.rows, strict=True):
            bias[e][rows.to(device)] = read(part).to(device, like.dtype)
    return bias


def require_form(experts: nn.Module) -> Form:
    """Return the structure of `experts`, still on meta; raises FormatError if `form_of` does not know it."""
    form = form_of(experts)
    if form is None:
        raise FormatError(f"{type(experts).__name__} stacks experts in a way that llmq does not support")
    return form


def _require_shape(where: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise FormatError unless (E, N, K) in the checkpoint is the shape in the module."""
    if actual != expected:
        raise FormatError(
            f"{where} has the shape {actual} in the checkpoint, expected {expected} by config.json",
            hint="use the config.json that belongs to these weights",
        )


def _common_inputs(stacking: Stacking, inputs: Callable[[str], InputScheme | None]) -> InputScheme | None:
    """How the inputs of all parts are quantized; raises FormatError for parts that differ: one op computes them."""
    schemes = {inputs(name) for name in stacking.modules()}
    if len(schemes) > 1:
        raise FormatError(
            f"the experts of {stacking.names[0][0]} have inputs in {listed(sorted(map(str, schemes)))}, expected one",
            hint="quantize the inputs of all experts of a layer alike",
        )
    return schemes.pop()


def _require_alike(name: str, part: QuantizedTensor, first_name: str, first: QuantizedTensor, rows: int) -> None:
    """Raise FormatError unless a part has the same grid as the first: one op computes all experts."""
    for property_, actual, expected in (
        ("the grid", part.scheme, first.scheme),
        ("the shape", part.shape, (rows, first.shape[1])),
        ("scales of", part.scales.dtype, first.scales.dtype),
        ("zero points", part.zeros is not None, first.zeros is not None),
    ):
        if actual != expected:
            raise FormatError(
                f"{name} has {property_} {actual}, expected {expected} as in {first_name}",
                hint="quantize all experts of a layer alike",
            )
    if part.group_index is not None:
        raise FormatError(
            f"{name} is grouped by act-order, which llmq does not support for experts",
            hint="use a checkpoint without desc_act",
        )
