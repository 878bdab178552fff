"""The experts of a layer as plain linear layers, so that everything behind the skeleton treats them as any other.

    experts.gate_up_proj (E, 2N, K) ──►  experts.0.gate_proj  experts.0.up_proj  experts.0.down_proj
    experts.down_proj    (E, K, N)       experts.1.gate_proj  …

`SeparateExperts` takes the place of the module that `stacking.form_of` knows, is called as it was, and computes the
same.  Every expert runs for every batch, on no tokens if none go there: first gate and up of all, then all that comes
down.  In front of either half there is a `Station`, which is told where all tokens went: there a forward can be stopped
and looked at before any weight of that half is used.

A checkpoint that has the tensors stacked is read one expert at a time, and what is left as it is stays stacked there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.checkpoint_names import ModelWeights
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
"""A stacked tensor's name in the checkpoint, and the number of an expert -> that expert's part of it."""


@dataclass(frozen=True)
class Routed:
    """Where the tokens of a batch went.

    hidden  (R, K) what the experts are fed; a row a token, but for each expert again where it is not `Form.routed`
    rows    rows[e] (n_e,) int64: those of them that are for expert e
    tokens  of the batch
    inner   inner[e] (n_e, N) what expert e feeds its second projection; None in front of the first
    """

    hidden: Tensor
    rows: Sequence[Tensor]
    tokens: int
    inner: Sequence[Tensor] | None = None

    @property
    def all_rows(self) -> Tensor:
        """Rows of `hidden` that are tokens, whatever expert they are for."""
        if len(self.hidden) == self.tokens:
            return torch.arange(self.tokens, device=self.hidden.device)
        return torch.cat(list(self.rows))

    def inputs(self, expert: int) -> Tensor:
        """(n_e, …) what an expert's weights are about to be fed."""
        return self.hidden[self.rows[expert]] if self.inner is None else self.inner[expert]


class Station(nn.Module):
    """A place in a forward; hooks may stop it here."""

    def forward(self, routed: Routed) -> None:
        """Nothing happens."""


class _Unset(nn.Linear):
    """A linear layer on meta; a mixture has tens of thousands, and drawing weights for nobody would take a minute."""

    def reset_parameters(self) -> None:
        """What it holds comes from a checkpoint."""


class SeparateExperts(RoutedExperts):
    """The experts of one layer; `fused` is the module whose place it takes, on meta.

    `parts[side]` names the linear layers of each expert in its first and its second projection; which rows of the
    first one's output each makes is in `rows`.
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
        self._fused = (_sharing(fused, self),)  # in a tuple, as it is no module of ours: it says how to activate
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
        nobody = outer.new_zeros(len(order) - len(outer), outer.shape[1])
        return torch.cat([outer, nobody])[torch.argsort(order)]

    def _by_expert(self, hidden: Tensor, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        self.before_up(Routed(hidden, rows, tokens))
        inner = [self.inner(e, hidden[chosen]) for e, chosen in enumerate(rows)]
        self.before_down(Routed(hidden, rows, tokens, inner))
        outer = [self.expert(e).get_submodule(DOWN)(x) for e, x in enumerate(inner)]
        if getattr(self._fused[0], "has_post_expert_norm", False):
            norm = self.get_submodule("post_expert_norm")
            outer = [norm(y) for y in outer]
        return outer

    def inner(self, e: int, x: Tensor) -> Tensor:
        """What expert e makes of x (n, K) before its second projection, (n, N)."""
        made = [self.expert(e).get_submodule(part)(x) for part in self.parts[0]]
        together = made[0]
        if len(made) > 1:  # in the order in which the fused module has them
            together = torch.cat(made, -1)
            if self.form.interleaved:
                together = together[:, torch.argsort(torch.cat(list(self.rows))).to(x.device)]
        return activate(self._fused[0], self.form, together)


def separate(
    model: nn.Module,
    weights: ModelWeights,
    modules: Iterable[str],
    shape: Callable[[str], tuple[int, ...]],
    read_member: ReadMember,
) -> None:
    """Put `SeparateExperts` in the place of all stacked experts of a model on meta; tells `weights` where theirs are.

    `modules` and `shape` as in `find_stackings`.  What the checkpoint has in a way that is not understood is left.
    """
    stackings = find_stackings(model, weights, modules, shape)
    for path, (fused, form) in fused_experts(model).items():
        found = stackings_of(path, fused, stackings)
        places: dict[str, str] = {}
        if found:
            separated = SeparateExperts(fused, form, found)
            for names, stacking in zip(separated.parts, found, strict=True):
                places |= _places(path, names, stacking)
        else:
            stored = [weights.stored_name(f"{path}.{name}") for name in form.parameters]
            if None in stored:
                continue
            prefix = next((s.removesuffix(f".{form.up}") for s in stored if s and s.endswith(f".{form.up}")), path)
            found = [plain_stacking(prefix, fused, form, name) for name in form.stacked]
            separated = SeparateExperts(fused, form, found)
            for names, stacking in zip(separated.parts, found, strict=True):
                places |= _places(path, names, stacking)
            weights.provide(*_members(form, found, dict(zip(form.parameters, stored, strict=True)), read_member))
        weights.place(places)
        model.set_submodule(path, separated)


def _places(path: str, parts: Sequence[str], stacking: Stacking) -> dict[str, str]:
    """The path of each linear layer in the model -> its name in the checkpoint."""
    return {
        f"{path}.{e}.{part}": name
        for e, names in enumerate(stacking.names)
        for part, name in zip(parts, names, strict=True)
    }


def _members(
    form: Form, stackings: Sequence[Stacking], stored: Mapping[str, Any], read_member: ReadMember
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """For the name of each expert's tensor, how to read it, and in which stacked one it is."""
    read: dict[str, Callable[[], Tensor]] = {}
    source: dict[str, str] = {}

    def weight(tensor: str, e: int, rows: Tensor) -> Tensor:
        member = read_member(tensor, e)
        return (member.T if form.transposed else member)[rows].contiguous()

    def bias(tensor: str, e: int, rows: Tensor) -> Tensor:
        return read_member(tensor, e)[rows]

    for name, stacking in zip(form.stacked, stackings, strict=True):
        for e, parts in enumerate(stacking.names):
            for part, rows in zip(parts, stacking.rows, strict=True):
                read[f"{part}.weight"] = partial(weight, stored[name], e, rows)
                source[f"{part}.weight"] = stored[name]
                if form.biased:
                    read[f"{part}.bias"] = partial(bias, stored[f"{name}_bias"], e, rows)
                    source[f"{part}.bias"] = stored[f"{name}_bias"]
    return read, source


def _sharing(fused: nn.Module, owner: nn.Module) -> Any:
    """A copy that has the parameters, buffers and modules of another; what else it has is its own."""
    copied = fused.__class__.__new__(fused.__class__)
    copied.__dict__.update(fused.__dict__)
    copied._parameters, copied._buffers, copied._modules = owner._parameters, owner._buffers, owner._modules
    return copied
