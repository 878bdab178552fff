"""The experts of a mixture, packed: two calls of one op where transformers has two stacked float parameters.

transformers holds the experts of a layer in one module with 3-D parameters, and its experts interface fixes what such
a module tells about itself: `gate_up_proj` (or `up_proj`, by `has_gate`) and `down_proj`, biases of those names with
`_bias` behind (`has_bias`), the activation between them (`_apply_gate` or `act_fn`), perhaps a norm behind them.  A
`PackedExperts` takes such a module's place, is called as it was, and asks the module itself for the activation: no
model is named here.  `stacking.py` finds the weights.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.model.weights import ModelWeights
from llmq.quantized import QuantizedTensor
from llmq.runtime.stacking import Stacking, stacked_names
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
            x, token, expert, self.words, self.scales, self.zeros, self.bias,
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


class PackedExperts(nn.Module):
    """The experts of one layer, called as transformers calls its own.

    `experts` is transformers' module, or any that has the attributes of its experts interface; its weights and their
    biases are not used.  `up` and `down` take the place of those.
    """

    def __init__(self, experts: nn.Module, up: PackedStack, down: PackedStack) -> None:
        super().__init__()
        self.experts = without(experts, {name + end for name in stacked_names(experts) for end in ("", "_bias")})
        self.up = up
        self.down = down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (M, K), top_k_index and top_k_weights (M, top_k): which experts, how much of each -> (M, K)."""
        M, top_k = top_k_index.shape
        experts: Any = self.experts
        expert = top_k_index.flatten().contiguous()  # (P,), P = M * top_k
        pair = torch.arange(M * top_k, device=expert.device)
        inner = self.up(hidden_states, pair // top_k, expert)  # (P, N)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outer = self.down(inner, pair, expert)  # (P, K)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1, 1)
        mixed: Tensor = weighted.view(M, top_k, outer.shape[1]).sum(1)
        return mixed.to(hidden_states.dtype)

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
    rest: Any = without(experts, stacked_names(experts))
    weights.fill(path, rest, device)
    stacks = []
    for name, stacking in zip(stacked_names(experts), stackings, strict=True):
        bias = rest.get_parameter(f"{name}_bias") if rest.has_bias else None
        stack = PackedStack(stacking, read, bias, device)
        _require_shape(f"{path}.{name}", (*stack.words.shape[:2], stack.in_features), experts, name)
        stacks.append(stack)
    return PackedExperts(rest, *stacks)


def fill_experts(
    path: str,
    experts: Any,
    stackings: Sequence[Stacking],
    weights: ModelWeights,
    device: torch.device,
) -> None:
    """Give a module of experts on meta the floats that the checkpoint holds one by one."""
    rest = without(experts, stacked_names(experts))
    weights.fill(path, rest, device)
    experts._parameters.update(rest._parameters)
    for name, stacking in zip(stacked_names(experts), stackings, strict=True):
        parameter = experts.get_parameter(name)
        filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        by_row = filled.mT if experts.is_transposed else filled  # (E, N, K)
        N = sum(len(rows) for rows in stacking.rows)
        _require_shape(f"{path}.{name}", (len(stacking.names), N, by_row.shape[2]), experts, name)
        for e, names in enumerate(stacking.names):
            for part, rows in zip(names, stacking.rows, strict=True):
                by_row[e][rows.to(device)] = weights.original(f"{part}.weight").to(device, parameter.dtype)
        experts._parameters[name] = nn.Parameter(filled, requires_grad=False)


def _require_shape(where: str, found: tuple[int, ...], experts: Any, name: str) -> None:
    """(E, N, K) as the checkpoint has it is what the module has, if in another order."""
    shape = experts.get_parameter(name).shape
    expected = (shape[0], shape[2], shape[1]) if experts.is_transposed else tuple(shape)
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
