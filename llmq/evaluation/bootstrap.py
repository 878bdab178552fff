"""Cluster bootstrap: intervals for means over tokens, from whole documents that are drawn again and again.

Tokens of a document depend on each other, so an interval that treats them as independent would be too narrow. A draw
takes documents with replacement, from each text as many as it has, and all tokens of each. The mean of a draw is the
sum over its tokens divided by their number. An interval contains 95 % of 1000 draws (basic percentiles).

The draws depend on the number of documents alone. So the same documents are drawn for all models, and the interval of a
difference between two models is narrower than those of the two models.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Interval = tuple[float, float]
DRAWS, SEED, COVERED = 1000, 0, 0.95
FEW_DOCUMENTS = 10  # with fewer, an interval of percentiles is too narrow


class Bootstrap:
    """The draws of some texts; `texts` holds the document of each token, (S, T) int64, per text."""

    def __init__(self, texts: Sequence[Tensor]) -> None:
        owners: list[Tensor] = []
        sizes: list[int] = []
        for documents in texts:
            numbers, owner = torch.unique(documents, return_inverse=True)
            owners.append(owner + sum(sizes))
            sizes.append(len(numbers))
        self._owners = torch.cat(owners)  # (S, T), numbered over all texts
        self.sizes = tuple(sizes)  # the number of documents of each text

    @functools.cached_property
    def weights(self) -> Tensor:
        """(DRAWS, D) float64, see `draws`."""
        return draws(self.sizes)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of `values` over the tokens of each document, and the number of these tokens, (D,) float64 each.

        values  (S, T), one per token, or (S, T - 1), one per token except the last of each sequence
        """
        owners = self._owners[:, : values.shape[1]].flatten()
        totals, counts = (torch.zeros(sum(self.sizes), dtype=torch.float64) for _ in range(2))
        totals.index_add_(0, owners, values.flatten().double())
        return totals, counts.index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))

    def interval(self, values: Tensor, then: Callable[[float], float] = float) -> Interval | None:
        """The interval of the mean of `values` (see `sums`), transformed by an increasing function."""
        return interval_of_ratio(*self.sums(values), self.weights, then)


def draws(sizes: Sequence[int]) -> Tensor:
    """(DRAWS, D) float64: how often each document is drawn, text by text; `sizes` are their numbers of documents."""
    generator = np.random.default_rng(SEED)
    counts = [generator.multinomial(size, np.full(size, 1 / size), size=DRAWS) for size in sizes]
    return torch.from_numpy(np.concatenate(counts, axis=1).astype(np.float64))


def interval_of_ratio(
    numerators: Tensor, denominators: Tensor, weights: Tensor, then: Callable[[float], float] = float
) -> Interval | None:
    """The interval of Σ numerators / Σ denominators over drawn documents, transformed by an increasing function.

    numerators, denominators  (D,) float64, one per document
    weights                   (DRAWS, D) float64, see `draws`

    None if each text has only one document, or if a value or a draw is not finite.
    """
    if bool((weights == weights[0]).all()) or not bool(torch.isfinite(numerators).all()):
        return None
    ratios = (weights @ numerators) / (weights @ denominators)
    if not bool(torch.isfinite(ratios).all()):  # a draw in which all denominators are zero
        return None
    tail = (1 - COVERED) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return then(low), then(high)
