"""Stacked experts whose weights are trained on their grids: a `FakeQuantizedLinear` for every part of every expert."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmq.runtime.packed_experts import PackedStack
from llmq.training.fake_quantized import FakeQuantizedLinear

MakeLayer = Callable[[str, Tensor | None], FakeQuantizedLinear]
"""Makes the trained layer of a part, from its name in the checkpoint and its float weight (N, K), if that is known."""


class FakeQuantizedStack(nn.Module):
    """Takes the place of a `PackedStack` in `PackedExperts`: parts[e][i] has the rows `stacking.rows[i]` of W[e]."""

    places: Tensor

    def __init__(self, packed: PackedStack, reference: Tensor | None, make: MakeLayer) -> None:
        """reference (E, N, K) holds the float weights, if they are known."""
        super().__init__()
        rows, self.bias = packed.stacking.rows, packed.bias
        self.parts = nn.ModuleList()
        for e, names in enumerate(packed.stacking.names):
            floats = [None if reference is None else reference[e][own] for own in rows]
            self.parts.append(nn.ModuleList(map(make, names, floats)))
        self.register_buffer("places", torch.argsort(torch.cat(list(rows))), persistent=False)

    def forward(self, x: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """x (M, K), token (P,) and expert (P,) int -> (P, N); zeros where expert[p] is not the number of an expert."""
        outside = ((expert < 0) | (expert >= len(self.parts))).nonzero().flatten()
        pairs, products = [outside], [x.new_zeros(len(outside), len(self.places))]
        experts: Any = self.parts
        for e, layers in enumerate(experts):  # also without tokens: processes expect a gradient of every parameter
            own = (expert == e).nonzero().flatten()
            product = torch.cat([layer(x[token[own]]) for layer in layers], dim=1)[:, self.places]
            pairs.append(own)
            products.append(product if self.bias is None else product + self.bias[e])
        return torch.cat(products)[torch.argsort(torch.cat(pairs))]
