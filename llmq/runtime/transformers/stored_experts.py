"""The experts of a layer as the checkpoint stores them, separately: placeholders while transformers loads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.experts.stacking import Stacking, activate
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme
from llmq.runtime.packed_experts import PackedExperts, PackedStack, require_form, stacked_bias, without
from llmq.runtime.transformers.stored_linear import Source, StoredLinear


class StoredExperts(nn.Module):
    """Replaces a module of stacked experts, with the same interface but without the stacked weights.

    Each weight of each expert is a `StoredLinear` in this module. `place_of` returns its place for its name in the
    checkpoint: the place where transformers expects its tensors.
    """

    def __init__(
        self, fused: nn.Module, stackings: Sequence[Stacking], source: Source, place_of: Callable[[str], str]
    ) -> None:
        super().__init__()
        self.form = form = require_form(fused)
        self.stackings = tuple(stackings)
        self._fused = (fused,)  # in a tuple, so that it is not a submodule; only its activation is used
        biased = form.biased and f"{stackings[0].names[0][0]}.bias" in source.checkpoint
        left_out = form.parameters if biased else form.stacked
        self._parameters.update({name: p for name, p in fused._parameters.items() if name not in left_out})
        self._buffers.update(fused._buffers)
        for name, child in fused.named_children():
            self.add_module(name, child)
        dtype = fused.get_parameter(form.up).dtype
        self._places = {name: place_of(name) for stacking in stackings for name in stacking.modules()}
        for name, place in self._places.items():
            *inner, last = place.split(".")
            parent: nn.Module = self
            for part in inner:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, StoredLinear(source, name, bias=biased, dtype=dtype))

    def part(self, name: str) -> StoredLinear:
        """The layer of one weight of one expert, by its name in the checkpoint."""
        layer = self.get_submodule(self._places[name])
        if not isinstance(layer, StoredLinear):
            raise TypeError(f"{self._places[name]} is a {type(layer).__name__}, expected a StoredLinear")
        return layer

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """See `RoutedExperts.forward`."""
        if top_k_index is None or top_k_weights is None:
            by_expert = hidden_states.view(len(self.stackings[0].names), -1, hidden_states.shape[-1])  # (E, M, K)
            return torch.cat([self._run(e, x) for e, x in enumerate(by_expert)])
        mixed: Tensor = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            if e < len(self.stackings[0].names):  # larger numbers mean: no expert
                token, place = torch.where(top_k_index == e)
                outer = self._run(e, hidden_states[token]) * top_k_weights[token, place].unsqueeze(1)
                mixed.index_add_(0, token, outer.to(mixed.dtype))
        return mixed

    def packed(self) -> PackedExperts | None:
        """The packed experts, or None if their weights are not on an integer grid or are offloaded."""
        parts = [self.part(name) for name in self._places]
        if not all(part.is_loaded and part.is_affine for part in parts):
            return None
        stacks = [self._stack(name, stacking) for name, stacking in zip(self.form.stacked, self.stackings, strict=True)]
        return PackedExperts(self._like_fused(), self.form, *stacks)

    def _stack(self, name: str, stacking: Stacking) -> PackedStack:
        return PackedStack(stacking, self._read, self._bias(name, stacking), self._device(stacking), self._inputs)

    def _inputs(self, name: str) -> InputScheme | None:
        return self.part(name).inputs

    def _device(self, stacking: Stacking) -> torch.device:
        return next(self.part(stacking.names[0][0]).parameters()).device

    def _read(self, name: str) -> QuantizedTensor:
        return self.part(name).quantized()

    def _bias(self, name: str, stacking: Stacking) -> Tensor | None:
        """(E, N), or None."""
        if f"{name}_bias" in self._parameters:
            return self.get_parameter(f"{name}_bias").detach()
        if not self.form.biased:
            return None
        like, device = self._fused[0].get_parameter(f"{name}_bias"), self._device(stacking)
        return stacked_bias(stacking, like, device, lambda part: self.part(part).get_parameter("bias").detach())

    def _like_fused(self) -> Any:
        """The module of transformers with the parameters loaded here; its stacked weights are still on meta."""
        own = {name for name, _ in self._fused[0].named_children()}
        like = without(self._fused[0], ())
        like._parameters = {**self._fused[0]._parameters, **self._parameters}
        like._buffers = self._buffers
        like._modules = {name: child for name, child in self._modules.items() if name in own}
        return like

    def _run(self, e: int, x: Tensor) -> Tensor:
        """The output (n, K) of expert e for x (n, K)."""
        like = self._like_fused()
        (up, down), (first, second) = self.form.stacked, self.stackings
        inner = activate(like, self.form, self._project(up, first, e, x))
        outer = self._project(down, second, e, inner)
        output: Tensor = like.post_expert_norm(outer) if getattr(like, "has_post_expert_norm", False) else outer
        return output

    def _project(self, name: str, stacking: Stacking, e: int, x: Tensor) -> Tensor:
        """The product (n, N) of a stacked weight of expert e and x (n, K)."""
        parts = [self.part(part)(x) for part in stacking.names[e]]
        y = torch.cat(parts, -1)[:, torch.argsort(torch.cat(list(stacking.rows))).to(x.device)]
        stacked = self._parameters.get(f"{name}_bias")
        return y if stacked is None else y + stacked[e].to(y.dtype)
