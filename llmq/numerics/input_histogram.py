"""How large the inputs of a weight are, as a histogram that grows with them.

`ranges.py` chooses the range of a static input scale from it. An input x of column k counts as the sum of squares of
the column, Σ_n W[n, k]²: an error of x changes the layer's output by this much.

Counts are whole numbers in float64, so the order in which batches and processes add to them changes no bit.
"""

import math

import torch
from torch import Tensor

from llmq.distributed.ranks import Ranks

BINS = 16_384
LEVELS = 65_535  # of the importance of a column
SMALLEST_LIMIT = 2.0**-100  # far from where BINS / limit ends in float32


class InputHistogram:
    """`counts` (BINS,) float64: the importance of the inputs with |x| in each of BINS equal bins from 0 to `limit`."""

    def __init__(self, energy: Tensor) -> None:
        """`energy` (K,) is the sum of squares of each column of the weights."""
        largest = energy.max().clamp_min(torch.finfo(torch.float32).tiny)
        self._importance = (energy / largest * LEVELS).round().to(torch.float64)
        self.counts = torch.zeros(BINS, dtype=torch.float64, device=energy.device)
        self.limit = 0.0

    def update(self, inputs: Tensor) -> None:
        """Add `inputs` (..., K). Values that are not finite are left out; the second moment reports them."""
        size = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32).abs().nan_to_num_(0.0, 0.0, 0.0)
        if size.numel() == 0:
            return
        self._grow(float(size.max()))
        if self.limit:
            index = (size * (BINS / self.limit)).to(torch.int64).clamp_(max=BINS - 1)
            weights = self._importance.expand(index.shape).flatten()
            self.counts += torch.bincount(index.flatten(), weights, minlength=BINS)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the counts of all ranks; all ranks must call it."""
        self._grow(max(ranks.all(self.limit)))
        ranks.sum_(self.counts)

    def _grow(self, largest: float) -> None:
        """Double `limit` until it holds `largest`; two bins become one."""
        if largest > self.limit == 0:
            self.limit = max(2.0 ** math.ceil(math.log2(largest)), SMALLEST_LIMIT)
        while largest > self.limit:
            half = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([half, torch.zeros_like(half)])
            self.limit *= 2
