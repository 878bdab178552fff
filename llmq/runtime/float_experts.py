"""Experts in floats whose inputs are quantized: weights in fp8 have no packed product, so they run dequantized.

The module of transformers has one function for both projections of all experts, and no place between them. So the
experts run one after the other here, with rounded inputs before each projection, as `llmq eval` runs them
(`model/experts/separate.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.experts.routed import RoutedExperts
from llmq.model.experts.stacking import Form, activate
from llmq.numerics.fake_quantize import Rounding


class FloatExperts(RoutedExperts):
    """Replaces `experts`, a module with the structure `form`, and has its parameters, buffers and modules.

    `roundings` are for the inputs of the first and of the second projection; None where they stay float.
    """

    def __init__(self, experts: nn.Module, form: Form, roundings: Sequence[Rounding | None]) -> None:
        super().__init__(form, form.shape(experts, form.up)[0])
        self._parameters, self._buffers, self._modules = experts._parameters, experts._buffers, experts._modules
        self._experts = (experts,)  # in a tuple, so that it is not a submodule; for its activation
        self.roundings = tuple(roundings)

    def run(self, hidden: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """See `RoutedExperts.run`."""
        experts: Any = self._experts[0]
        fed = _rounded(hidden, self.roundings[0])
        outer = hidden.new_zeros(len(expert), self.form.shape(experts, self.form.stacked[1])[1])
        for e in expert.unique().tolist():
            if e < self.expert_count:
                pairs = (expert == e).nonzero().flatten()
                inner = activate(experts, self.form, self._project(self.form.stacked[0], e, fed[token[pairs]]))
                product = self._project(self.form.stacked[1], e, _rounded(inner, self.roundings[1]))
                outer = outer.index_copy(0, pairs, product.to(outer.dtype))
        return experts.post_expert_norm(outer) if getattr(experts, "has_post_expert_norm", False) else outer

    def _project(self, name: str, e: int, x: Tensor) -> Tensor:
        """x (n, K) -> (n, N), with the stacked weight `name` of expert e."""
        weight = self.get_parameter(name)[e]
        bias = self.get_parameter(f"{name}_bias")[e] if self.form.biased else None
        return torch.nn.functional.linear(x, weight.T if self.form.transposed else weight, bias)


def _rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    return x if rounding is None else rounding(x)
