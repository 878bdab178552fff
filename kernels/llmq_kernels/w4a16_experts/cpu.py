"""The products in plain torch, on any device: pairs are sorted by expert, then each expert is one linear product.

Slicing needs the number of pairs per expert, so on a GPU this path synchronizes once per call and cannot be captured in
a CUDA graph.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels.w4a16 import cpu
from llmq_kernels.w4a16.packed_weight import PackedWeight


def experts(x: Tensor, token: Tensor, expert: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.experts` with float32 sums, (P, N) in x's dtype.  `op.check` has checked the arguments."""
    y = x.new_empty(token.shape[0], weight.words.shape[1])
    for e, pairs in _by_expert(expert, weight.words.shape[0]):
        rows = x.index_select(0, token.index_select(0, pairs))
        y[pairs] = cpu.linear(rows, _expert(weight, e), None if bias is None else bias[e])
    return y


def input_gradient(gradient: Tensor, token: Tensor, expert: Tensor, weight: PackedWeight[Tensor], rows: int) -> Tensor:
    """The gradient with respect to x: gradient (P, N) -> (rows, K) in its dtype, summed in float32."""
    shape = token.shape[0], weight.in_features
    by_pair = torch.empty(shape, dtype=torch.float32, device=gradient.device)  # (P, K)
    for e, pairs in _by_expert(expert, weight.words.shape[0]):
        outgoing = gradient.index_select(0, pairs).to(torch.float32)
        by_pair[pairs] = cpu.input_gradient(outgoing, _expert(weight, e))
    return _summed_by_token(by_pair, token, rows).to(gradient.dtype)


def _expert(weight: PackedWeight[Tensor], e: int) -> PackedWeight[Tensor]:
    return weight.with_arrays(lambda stack: stack[e])


def _by_expert(expert: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """`(e, pairs)` for every expert with at least one pair: its pairs (int64) in ascending order."""
    pairs = torch.argsort(expert, stable=True)
    sizes = torch.bincount(expert, minlength=count).tolist()
    for e, own in enumerate(torch.split(pairs, sizes)):
        if len(own):
            yield e, own


def _summed_by_token(by_pair: Tensor, token: Tensor, rows: int) -> Tensor:
    """(P, K) -> (rows, K), the pairs of each token added in ascending order.

    In rounds that each add at most one pair per token: `index_add_` adds in any order on a GPU, so two runs would
    differ.
    """
    total = torch.zeros(rows, by_pair.shape[1], dtype=by_pair.dtype, device=by_pair.device)
    pairs = torch.argsort(token, stable=True)
    tokens = token.index_select(0, pairs)
    place = torch.arange(len(pairs), device=token.device) - torch.searchsorted(
        tokens, tokens
    )  # among the pairs of its token
    for turn in range(int(place.max()) + 1 if len(pairs) else 0):
        added = pairs[place == turn]
        total[token.index_select(0, added)] += by_pair.index_select(0, added)
    return total
