"""The base class of modules that replace a module of stacked experts: with the same arguments and the same mixing.

The subclasses differ in how the products of the experts are computed: `model/experts/separate.py` has linear layers per
expert, for quantization; `runtime/packed_experts.py` has packed weights, for inference.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from llmq.model.experts.stacking import Form


class RoutedExperts(nn.Module, ABC):
    """The experts of one layer; a subclass implements `run`."""

    def __init__(self, form: Form, expert_count: int) -> None:
        super().__init__()
        self.form = form
        self.expert_count = expert_count

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states (M, K), top_k_index and top_k_weights (M, top_k): the experts and their weights -> (M, K).

        Without the latter two, hidden_states are (E * M, K); see `Form.routed`.
        """
        if top_k_index is None or top_k_weights is None:
            return self._on_own_rows(hidden_states)
        M, top_k = top_k_index.shape
        expert = top_k_index.flatten().contiguous()  # (P,), P = M * top_k
        outer = self.run(hidden_states, torch.arange(M * top_k, device=expert.device) // top_k, expert)
        weighted = outer * top_k_weights.reshape(-1, 1)
        mixed: Tensor = weighted.view(M, top_k, outer.shape[1]).sum(1)
        return mixed.to(hidden_states.dtype)

    def _on_own_rows(self, hidden_states: Tensor) -> Tensor:
        """Rows of zeros do not belong to the expert; there is no bias, so their output is zero."""
        rows = hidden_states.detach().any(-1).nonzero().flatten()
        outer = self.run(hidden_states, rows, rows // (len(hidden_states) // self.expert_count))
        return hidden_states.new_zeros(len(hidden_states), outer.shape[1]).index_copy(0, rows, outer)

    @abstractmethod
    def run(self, hidden: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """The output of expert[p] for row token[p] of hidden (R, K), for P pairs: token (P,), expert (P,) -> (P, K).

        If expert[p] is not the number of an expert, the output is zero.
        """
