"""AWQ: scale up the columns that meet large inputs, so that they round better.

Lin et al. 2023 (arXiv:2306.00978, equations 4 and 5).  W x = (W diag(s)) (x / s) holds for any s; the division is
folded into whatever makes x.  With a the mean |x| of each channel, s = aʳ, and r is the one of 20 values that
changes the output least:

    argmin_r  ‖ f(x; Q(W diag(s)) diag(1/s)) - f(x; W) ‖²

f is the whole block, as it is run, and Q the very rounding that will follow: a search per layer, or with a coarser
Q, finds scales that do little for the model (eval/LOG.md).  r = 0 is no scaling, so nothing is scaled where nothing
is won.
The second half of AWQ, clipping, is a rounding stage of its own (clip.py).
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
    """See `TransformStage`; scales mix nothing, so the width does not matter."""
    scales = channel_scales(stats, source, lambda scales: loss(scaling(scales)))
    return None if scales is None else scaling(scales)


def channel_scales(stats: InputStats, tied: Tensor, loss: Callable[[Tensor], float]) -> Tensor | None:
    """The scales (K,), alike for columns that are `tied`, or None where not to scale has the lowest `loss`."""
    levels = _tied_means(stats.mean_absolute, tied)
    best = loss(torch.ones_like(levels))
    chosen = None
    for step in range(1, EXPONENTS):
        scales = _normalised(levels, step / EXPONENTS, tied)
        found = loss(scales)
        if found < best:
            best, chosen = found, scales
    return chosen


def _tied_means(magnitude: Tensor, tied: Tensor) -> Tensor:
    """(K,): the magnitude of each channel, averaged over the channels that it is tied to; at least 1e-4 of the mean."""
    seen = (tied >= 0).to(magnitude.dtype)
    members = tied.clamp(min=0)
    sums = torch.zeros(int(members.max()) + 1, device=magnitude.device).index_add_(0, members, magnitude * seen)
    counts = torch.zeros_like(sums).index_add_(0, members, seen)
    means = (sums / counts.clamp(min=1))[members]
    return means.clamp(min=float(magnitude.mean()) * 1e-4 + 1e-12)


def _normalised(levels: Tensor, exponent: float, tied: Tensor) -> Tensor:
    """levels ** exponent, centred geometrically so that weights keep their size; 1 where nothing may be scaled."""
    scales = levels.pow(exponent)
    free = scales[tied >= 0]
    if len(free):
        scales = scales / (free.max() * free.min()).sqrt()
    return torch.where(tied >= 0, scales, torch.ones_like(scales))
