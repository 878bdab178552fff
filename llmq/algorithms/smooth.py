"""Smoothing: divide the input channels with large values by a factor, so that one scale fits all of them.

Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438).  W x = (W diag(s)) (x / s) holds for any s; the division is folded
into the layer that computes x.  With m the largest |x| of each channel, s = mʳ, and r is the exponent that changes the
output of the layers least:

    argmin_r  ‖ Q(W diag(s)) Q(x / s) - W x ‖²

r = 0 means that nothing is scaled, r = 1 that all channels have the same range.  The published recipe has a division by
the largest weight of each column in s, a fixed exponent, and scales norms only.  Here every layer that makes an input
can take the division: the up-projection for down_proj, whose inputs have the largest outliers, and v for o.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.algorithms.awq import normalised
from llmq.numerics.block_diagonal import scaling
from llmq.numerics.input_stats import InputStats

EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def basis(
    stats: InputStats, source: Tensor, width: Callable[[], int], loss: Callable[[Tensor], float]
) -> Tensor | None:
    """See `TransformStage`.  Scales do not mix columns, so `width` is not used."""
    levels = _tied_largest(stats.largest, source)
    best, chosen = loss(scaling(torch.ones_like(levels))), None
    for exponent in EXPONENTS:
        candidate = scaling(normalised(levels, exponent, source))
        candidate_loss = loss(candidate)
        if candidate_loss < best:
            best, chosen = candidate_loss, candidate
    return chosen


def _tied_largest(largest: Tensor, tied: Tensor) -> Tensor:
    """(K,) float32: the largest |x| of each channel and of those tied to it; at least 1e-4 of that of all."""
    members = tied.clamp(min=0)
    shared = torch.zeros(int(members.max()) + 1, device=largest.device)
    shared.scatter_reduce_(0, members, torch.where(tied >= 0, largest, 0.0), "amax")
    return shared[members].clamp(min=float(largest.max()) * 1e-4 + 1e-12)
