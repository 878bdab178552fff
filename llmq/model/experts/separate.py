"""The experts of a layer as plain linear layers, so that all other code treats them like any linear layer.

    experts.gate_up_proj (E, 2N, K) ──►  experts.0.gate_proj  experts.0.up_proj  experts.0.down_proj
    experts.down_proj    (E, K, N)       experts.1.gate_proj  …

`SeparateExperts` replaces the module that `stacking.form_of` recognizes, takes the same arguments, and computes the
same. Every expert runs for every batch, possibly on no tokens: first the gate and up projections of all experts, then
all down projections. Before each half there is a `Station`, a module whose input says where all tokens went. A hook on
it can stop the forward before any weight of this half is used.

A checkpoint with stacked tensors is read one expert at a time. Experts that are kept in float are written stacked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.conversions import converted_stacks
from llmq.model.experts.routed import RoutedExperts
from llmq.model.experts.stacking import (
    DOWN,
    Form,
    Stacking,
    activate,
    find_stackings,
    fused_experts,
    plain_stacking,
    stackings_of,
)

ReadMember = Callable[[str, int], Tensor]
"""The name of a stacked tensor in the checkpoint, the number of an expert -> the part of this expert."""


@dataclass(frozen=True)
class Routed:
    """Where the tokens of a batch went.

    hidden  (R, K) the input of the experts: one row per token; one per token and expert if `Form.routed` is false
    rows    rows[e] (n_e,) int64: the rows that go to expert e
    tokens  the number of tokens in the batch
    inner   inner[e] (n_e, N): the input of the second projection of expert e; None before the first projection
    """

    hidden: Tensor
    rows: Sequence[Tensor]
    tokens: int
    inner: Sequence[Tensor] | None = None

    @property
    def all_rows(self) -> Tensor:
        """The rows of `hidden` that contain tokens, for all experts."""
        if len(self.hidden) == self.tokens:
            return torch.arange(self.tokens, device=self.hidden.device)
        return torch.cat(list(self.rows))

    def largest(self) -> float:
        """The largest absolute value that goes into the next projection of any expert."""
        parts = [self.hidden[self.all_rows]] if self.inner is None else self.inner
        return max((float(part.abs().amax()) for part in parts if part.numel()), default=0.0)

    def inputs(self, expert: int) -> Tensor:
        """(n_e, …) the input of the next projection of an expert."""
        return self.hidden[self.rows[expert]] if self.inner is None else self.inner[expert]


class Station(nn.Module):
    """A place in a forward where hooks may stop it."""

    def forward(self, routed: Routed) -> None:
        """Does nothing."""


class _Unset(nn.Linear):
    """A linear layer on meta without random weights: drawing them for tens of thousands of experts takes a minute."""

    def reset_parameters(self) -> None:
        """Does nothing: the parameters are read from a checkpoint."""


class SeparateExperts(RoutedExperts):
    """The experts of one layer; `fused` is the module on meta that it replaces.

    parts  parts[side]: the names of the linear layers of each expert in its first and its second projection
    rows   rows[i] (N_i,) int64: the rows of the first projection that linear layer i of it makes
    """

    def __init__(self, fused: nn.Module, form: Form, stackings: Sequence[Stacking]) -> None:
        super().__init__(form, form.shape(fused, form.up)[0])
        self.parts = tuple(
            form.parts(name) if len(form.parts(name)) == len(stacking.rows) else (name,)
            for name, stacking in zip(form.stacked, stackings, strict=True)
        )
        self.rows = stackings[0].rows
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._parameters.update({n: p for n, p in fused._parameters.items() if n not in form.parameters})
        self._buffers.update(fused._buffers)
        self._fused = (_sharing(fused, self),)  # only for `activate`; in a tuple, so that it is not a submodule
        for e in range(self.expert_count):
            expert = nn.Module()
            for name, parts, stacking in zip(form.stacked, self.parts, stackings, strict=True):
                like = fused.get_parameter(name)
                K = form.shape(fused, name)[2]
                for part, rows in zip(parts, stacking.rows, strict=True):
                    linear = _Unset(K, len(rows), bias=form.biased, device="meta", dtype=like.dtype)
                    expert.add_module(part, linear)
            self.add_module(str(e), expert)
        self.before_up, self.before_down = Station(), Station()
        self.train(fused.training).requires_grad_(False)

    def expert(self, e: int) -> nn.Module:
        return self.get_submodule(str(e))

    def run(self, hidden: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """See `RoutedExperts.run`; pairs are sorted by expert, and each expert runs once on all of its rows."""
        order = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert, minlength=self.expert_count)[: self.expert_count].tolist()
        rows = token[order[: sum(counts)]].split(counts)
        tokens = len(hidden) if self.form.routed else len(hidden) // self.expert_count
        outer = torch.cat(self._by_expert(hidden, rows, tokens))  # (≤ P, K)
        without_expert = outer.new_zeros(len(order) - len(outer), outer.shape[1])
        return torch.cat([outer, without_expert])[torch.argsort(order)]

    def _by_expert(self, hidden: Tensor, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        self.before_up(Routed(hidden, rows, tokens))
        inner = [self.inner(e, hidden[rows_of_expert]) for e, rows_of_expert in enumerate(rows)]
        self.before_down(Routed(hidden, rows, tokens, inner))
        outer = [self.expert(e).get_submodule(DOWN)(x) for e, x in enumerate(inner)]
        if getattr(self._fused[0], "has_post_expert_norm", False):
            norm = self.get_submodule("post_expert_norm")
            outer = [norm(y) for y in outer]
        return outer

    def inner(self, e: int, x: Tensor) -> Tensor:
        """The input (n, N) of the second projection of expert e, for the input x (n, K) of the first."""
        outputs = [self.expert(e).get_submodule(part)(x) for part in self.parts[0]]
        joined = outputs[0]
        if len(outputs) > 1:  # in the order of the fused module
            joined = torch.cat(outputs, -1)
            if self.form.interleaved:
                joined = joined[:, torch.argsort(torch.cat(list(self.rows))).to(x.device)]
        return activate(self._fused[0], self.form, joined)


def separate(
    model: nn.Module,
    weights: ModelWeights,
    modules: Iterable[str],
    shape: Callable[[str], tuple[int, ...]],
    read_member: ReadMember,
    names: Iterable[str] = (),
) -> None:
    """Replace all stacked experts of a model on meta by `SeparateExperts`, and register their tensors in `weights`.

    `modules` and `shape` are those of `find_stackings`, `names` those of all tensors of the checkpoint. Experts that
    the checkpoint stores in an unknown way are not replaced.
    """
    stackings = find_stackings(model, weights, modules, shape)
    lacking = {
        f"{path}.{name}": fused.get_parameter(name)
        for path, (fused, form) in fused_experts(model).items()
        for name in form.stacked
        if f"{path}.{name}" not in stackings and weights.lacks(f"{path}.{name}")
    }
    converted = converted_stacks(model, names, lacking)
    for path, (fused, form) in fused_experts(model).items():
        projections = stackings_of(path, fused, stackings)
        places: dict[str, str] = {}
        if projections:
            separated = SeparateExperts(fused, form, projections)
            for parts, stacking in zip(separated.parts, projections, strict=True):
                places |= _places(path, parts, stacking)
        else:
            ordered = {name: converted[f"{path}.{name}"] for name in form.stacked if f"{path}.{name}" in converted}
            stored = [
                ordered[name][0] if name in ordered else weights.stored_name(f"{path}.{name}")
                for name in form.parameters
            ]
            if None in stored:
                continue
            prefix = _prefix(path, form, [name for name in stored if name is not None], weights)
            projections = [plain_stacking(prefix, fused, form, name) for name in form.stacked]
            separated = SeparateExperts(fused, form, projections)
            for parts, stacking in zip(separated.parts, projections, strict=True):
                places |= _places(path, parts, stacking)
            orders = {name: order for name, (_, order) in ordered.items()}
            tensors = dict(zip(form.parameters, stored, strict=True))
            weights.provide(*_members(form, projections, tensors, orders, read_member))
        weights.place(places)
        model.set_submodule(path, separated)


def _prefix(path: str, form: Form, stored: Sequence[str], weights: ModelWeights) -> str:
    """The name of a module of experts in the checkpoint, which may store its stacks under other names."""
    usual = (name.removesuffix(f".{form.up}") for name in stored if name.endswith(f".{form.up}"))
    beside = (name for name in weights.candidates(path) if stored[0].startswith(f"{name.rpartition('.')[0]}."))
    return next(usual, None) or next(beside, path)


def _places(path: str, parts: Sequence[str], stacking: Stacking) -> dict[str, str]:
    """The path of each linear layer in the model -> its name in the checkpoint."""
    return {
        f"{path}.{e}.{part}": name
        for e, names in enumerate(stacking.names)
        for part, name in zip(parts, names, strict=True)
    }


def _members(
    form: Form,
    stackings: Sequence[Stacking],
    stored: Mapping[str, Any],
    orders: Mapping[str, Tensor],
    read_member: ReadMember,
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """For the name of each expert's tensor: a function that reads it, and the stacked tensor that contains it."""
    read: dict[str, Callable[[], Tensor]] = {}
    source: dict[str, str] = {}

    def weight(tensor: str, e: int, rows: Tensor) -> Tensor:
        member = read_member(tensor, e)
        return (member.T if form.transposed else member)[rows].contiguous()

    def bias(tensor: str, e: int, rows: Tensor) -> Tensor:
        return read_member(tensor, e)[rows]

    for name, stacking in zip(form.stacked, stackings, strict=True):
        for e, parts in enumerate(stacking.names):
            for part, own_rows in zip(parts, stacking.rows, strict=True):
                rows = orders[name][own_rows] if name in orders else own_rows
                read[f"{part}.weight"] = partial(weight, stored[name], e, rows)
                source[f"{part}.weight"] = stored[name]
                if form.biased:
                    read[f"{part}.bias"] = partial(bias, stored[f"{name}_bias"], e, rows)
                    source[f"{part}.bias"] = stored[f"{name}_bias"]
    return read, source


def _sharing(fused: nn.Module, owner: nn.Module) -> Any:
    """A copy of `fused` with the parameters, buffers and modules of `owner`."""
    copied = fused.__class__.__new__(fused.__class__)
    copied.__dict__.update(fused.__dict__)
    copied._parameters, copied._buffers, copied._modules = owner._parameters, owner._buffers, owner._modules
    return copied
