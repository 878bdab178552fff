"""The products in plain torch, for tensors on any device: pairs are sorted by expert, then it is one linear an expert.

How many pairs an expert has must be known to slice them, so on a GPU this path waits for the queue once a call and
cannot be captured in a CUDA graph.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq_kernels.w4a16 import cpu


def experts(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """`reference.experts` with float32 sums, (P, N) in x's dtype.  `op.check` has seen the arguments."""
    y = x.new_empty(token.shape[0], words.shape[1])
    for e, pairs in _by_expert(expert, words.shape[0]):
        y[pairs] = cpu.linear(
            x.index_select(0, token.index_select(0, pairs)), words[e], scales[e],
            None if zeros is None else zeros[e], None if bias is None else bias[e], None,
            bits=bits, in_features=in_features, columns_per_group=columns_per_group,
        )  # fmt: skip
    return y


def input_gradient(
    gradient: Tensor,
    token: Tensor,
    expert: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    rows: int,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """The gradient with respect to x: gradient (P, N) -> (rows, K) in its dtype, summed in float32."""
    by_pair = torch.empty(token.shape[0], in_features, dtype=torch.float32, device=gradient.device)  # (P, K)
    for e, pairs in _by_expert(expert, words.shape[0]):
        by_pair[pairs] = cpu.input_gradient(
            gradient.index_select(0, pairs).to(torch.float32), words[e], scales[e],
            None if zeros is None else zeros[e], None,
            bits=bits, in_features=in_features, columns_per_group=columns_per_group,
        )  # fmt: skip
    return _summed_by_token(by_pair, token, rows).to(gradient.dtype)


def _by_expert(expert: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """`(e, pairs)` for every expert that has any: its pairs (int64) in ascending order."""
    pairs = torch.argsort(expert, stable=True)
    sizes = torch.bincount(expert, minlength=count).tolist()
    for e, own in enumerate(torch.split(pairs, sizes)):
        if len(own):
            yield e, own


def _summed_by_token(by_pair: Tensor, token: Tensor, rows: int) -> Tensor:
    """(P, K) -> (rows, K), the pairs of each token added in ascending order.

    In rounds, of which each adds at most one pair to a token: `index_add_` adds in any order on a GPU, so that two runs
    would differ.
    """
    total = torch.zeros(rows, by_pair.shape[1], dtype=by_pair.dtype, device=by_pair.device)
    pairs = torch.argsort(token, stable=True)
    tokens = token.index_select(0, pairs)
    place = torch.arange(len(pairs), device=token.device) - torch.searchsorted(tokens, tokens)  # among its token's
    for turn in range(int(place.max()) + 1 if len(pairs) else 0):
        added = pairs[place == turn]
        total[token.index_select(0, added)] += by_pair.index_select(0, added)
    return total
