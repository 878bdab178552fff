"""The experts of a mixture, packed: two calls of one op where transformers has two stacked float parameters.

transformers holds the experts of a layer in one module with 3-D parameters; `model/experts/stacking.py` knows how it
is made, and where its weights are in a checkpoint.  A `PackedExperts` takes such a module's place, is called as it
was, and asks the module itself for the activation: no model is named here.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.experts.routed import RoutedExperts
from llmq.model.experts.stacking import Form, Stacking, activate, form_of
from llmq.numerics.quantized_tensor import QuantizedTensor
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

    def __init__(self, stacking: Stacking, read: Read, bias: Tensor | None, device: torch.device) -> None:
        """`read` gives the parts by their names, one expert after the other; bias is (E, N) or None.

        Raises FormatError for parts that differ in anything but their rows.
        """
        super().__init__()
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
        product: Tensor = torch.ops.llmq.w4a16_experts(
            x, token, expert, self.bias, self.words, self.scales, self.zeros,
            self.scheme.bits, self.in_features, self.columns_per_group,
        )  # fmt: skip
        return product

    def quantized(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """`(name, weight)` of every part of every expert: what the stack was made from, code for code."""
        for e, names in enumerate(self.stacking.names):
            for name, rows in zip(names, self.stacking.rows, strict=True):
                rows = rows.to(self.words.device)
                codes = layout.unpack(self.words[e][rows], self.scheme.bits, self.in_features)
                zeros = None if self.zeros is None else self.zeros[e][:, rows].T.contiguous()
                yield name, QuantizedTensor(codes, self.scales[e][:, rows].T.contiguous(), zeros, self.scheme)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedStack":
        """Moves and casts.  The scales, for which the codes were chosen, pass as integers: they are never cast."""
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
    """The experts of one layer, called as transformers calls its own.

    `experts` is transformers' module, and `form` what `form_of` says of it; its weights and their biases are not used.
    `up` and `down` take the place of those.
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
        """`(name, weight)` of every expert, exactly as the module was made from them, one at a time."""
        yield from self.up.quantized()
        yield from self.down.quantized()


def without(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy that shares everything but lacks some parameters."""
    copied, left_out = copy.copy(module), set(names)
    copied._parameters = {name: value for name, value in module._parameters.items() if name not in left_out}
    return copied


def pack_experts(
    path: str,
    experts: nn.Module,
    stackings: Sequence[Stacking],
    read: Read,
    weights: ModelWeights,
    device: torch.device,
) -> PackedExperts:
    """What takes the place of the experts at `path`, a module on meta; what it holds beside the weights is filled."""
    form = require_form(experts)
    rest = without(experts, form.parameters)
    weights.fill(path, rest, device)
    stacks = []
    for name, stacking in zip(form.stacked, stackings, strict=True):
        bias = _bias(path, experts, form, name, stacking, weights, device) if form.biased else None
        stack = PackedStack(stacking, read, bias, device)
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
    """Give a module of experts on meta the floats that the checkpoint holds one by one."""
    form = require_form(experts)
    rest = without(experts, form.parameters)
    weights.fill(path, rest, device)
    filled: dict[str, Tensor] = {}
    for name, stacking in zip(form.stacked, stackings, strict=True):
        parameter = experts.get_parameter(name)
        filled[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        by_row = filled[name].mT if form.transposed else filled[name]  # (E, N, K)
        N = sum(len(rows) for rows in stacking.rows)
        found = (len(stacking.names), N, by_row.shape[2])
        _require_shape(f"{path}.{name}", found, form.shape(experts, name))
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
    """(E, N) that of a stacked weight: stacked in the checkpoint as well, or a part with each part of the weight."""
    parameter = experts.get_parameter(f"{name}_bias")
    if weights.stored_name(f"{path}.{name}_bias") is not None:
        return weights.original(f"{path}.{name}_bias").to(device, parameter.dtype)
    return stacked_bias(stacking, parameter, device, lambda part: weights.original(f"{part}.bias"))


def stacked_bias(stacking: Stacking, like: Tensor, device: torch.device, read: Callable[[str], Tensor]) -> Tensor:
    """(E, N) in the shape and dtype of `like`, from those of the parts, which `read` gives by their names."""
    bias = torch.empty(like.shape, dtype=like.dtype, device=device)
    for e, names in enumerate(stacking.names):
        for part, rows in zip(names, stacking.rows, strict=True):
            bias[e][rows.to(device)] = read(part).to(device, like.dtype)
    return bias


def require_form(experts: nn.Module) -> Form:
    """Raises FormatError for a module that `form_of` does not know; `experts` is to be on meta still."""
    form = form_of(experts)
    if form is None:
        raise FormatError(f"{type(experts).__name__} stacks experts in a way that llmq does not run packed")
    return form


def _require_shape(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """(E, N, K) as the checkpoint has it is what the module has."""
    if found != expected:
        raise FormatError(
            f"{where} has the shape {found} in the checkpoint, the configuration asks for {expected}",
            hint="is config.json the one that belongs to these weights?",
        )


def _require_alike(name: str, part: QuantizedTensor, first_name: str, first: QuantizedTensor, rows: int) -> None:
    """One op serves all experts, so they have one grid."""
    for what, found, expected in (
        ("the grid", part.scheme, first.scheme),
        ("the shape", part.shape, (rows, first.shape[1])),
        ("scales of", part.scales.dtype, first.scales.dtype),
        ("zeros", part.zeros is not None, first.zeros is not None),
    ):
        if found != expected:
            raise FormatError(
                f"{name} has {what} {found}, {first_name} beside it {expected}",
                hint="llmq runs experts of one layer packed only if they are quantized alike",
            )
    if part.group_index is not None:
        raise FormatError(
            f"{name} is grouped in the order of its activations, which llmq does not run for experts",
            hint="a checkpoint made without desc_act",
        )
