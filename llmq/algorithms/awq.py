"""AWQ: scale up the columns with large inputs, so that quantization costs them less precision.

Lin et al. 2023 (arXiv:2306.00978, equations 4 and 5).  W x = (W diag(s)) (x / s) holds for any s; the division is
folded into the layer that computes x.  With a the mean |x| of each channel, s = aʳ, and r is the one of 20 values
that changes the output least:

    argmin_r  ‖ f(x; Q(W diag(s)) diag(1/s)) - f(x; W) ‖²

f is the whole block, and Q is the same quantization that follows.  A search per layer, or with a coarser Q, finds
scales that do little for the model (eval/LOG.md).  r = 0 means scales of 1, so nothing is scaled where scaling does
not help.
The second half of AWQ, clipping, is a separate rounding stage (clip.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.numerics.block_diagonal import scaling
from llmq.numerics.input_stats import InputStats

EXPONENTS = 20


def basis(
    stats: InputStats, source: Tensor, width: Callable[[], int], loss: Callable[[Tensor], float]
) -> Tensor | None:
    """See `TransformStage`.  Scales do not mix columns, so `width` is not used."""
    scales = channel_scales(stats, source, lambda scales: loss(scaling(scales)))
    return None if scales is None else scaling(scales)


def channel_scales(stats: InputStats, tied: Tensor, loss: Callable[[Tensor], float]) -> Tensor | None:
    """The scales (K,), equal for columns that are `tied`; None where scales of 1 have the lowest `loss`."""
    levels = _tied_means(stats.mean_absolute, tied)
    best = loss(torch.ones_like(levels))
    chosen = None
    for step in range(1, EXPONENTS):
        scales = normalised(levels, step / EXPONENTS, tied)
        scaled_loss = loss(scales)
        if scaled_loss < best:
            best, chosen = scaled_loss, scales
    return chosen


def _tied_means(magnitude: Tensor, tied: Tensor) -> Tensor:
    """(K,) float32: the magnitude of each channel, averaged over its tied channels; at least 1e-4 of the mean."""
    seen = (tied >= 0).to(magnitude.dtype)
    members = tied.clamp(min=0)
    sums = torch.zeros(int(members.max()) + 1, device=magnitude.device).index_add_(0, members, magnitude * seen)
    counts = torch.zeros_like(sums).index_add_(0, members, seen)
    means = (sums / counts.clamp(min=1))[members]
    return means.clamp(min=float(magnitude.mean()) * 1e-4 + 1e-12)


def normalised(levels: Tensor, exponent: float, tied: Tensor) -> Tensor:
    """levels ** exponent, divided so that the geometric mean of the largest and the smallest is 1.

    This keeps the size of the weights.  1 for columns that must not be scaled.
    """
    scales = levels.pow(exponent)
    free = scales[tied >= 0]
    if len(free):
        scales = scales / (free.max() * free.min()).sqrt()
    return torch.where(tied >= 0, scales, torch.ones_like(scales))
