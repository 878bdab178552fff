"""All groups at once, candidate by candidate, in torch for any device."""

import torch
from torch import Tensor

from llmq_kernels.grid_search.candidates import Candidates

ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}  # rows are searched in pieces that stay in cache

Best = tuple[Tensor, Tensor, Tensor]  # error, scales, zero points, all (R, G, 1)


def search(
    groups: Tensor,
    costs: Tensor,
    first: tuple[Tensor, Tensor],
    widest: Tensor,
    zeros: Tensor,
    candidates: Candidates,
) -> tuple[Tensor, Tensor]:
    """See `op.search`."""
    rows = max(1, ELEMENTS_AT_ONCE.get(groups.device.type, 1 << 20) // max(1, groups[:1].numel()))
    results = []
    for start in range(0, len(groups), rows):
        piece = slice(start, start + rows)
        piece_costs = costs if costs.dim() == 2 else costs[piece]
        scale, zero, span, origin = (part[piece, :, None] for part in (*first, widest, zeros))
        results.append(_search(groups[piece], piece_costs, scale, zero, span, origin, candidates))
    scales, chosen = (torch.cat(part) for part in zip(*results, strict=True))
    return scales.squeeze(-1), chosen.squeeze(-1)


def stored(scales: Tensor, dtype: torch.dtype, smallest: float) -> Tensor:
    """`scales` as a file of `dtype` stores them: clamped to its range, then rounded; float32."""
    return scales.clamp(min=smallest, max=torch.finfo(dtype).max).to(dtype).to(torch.float32)


def _search(
    groups: Tensor,
    costs: Tensor,
    first_scales: Tensor,
    first_zeros: Tensor,
    widest: Tensor,
    zeros: Tensor,
    candidates: Candidates,
) -> tuple[Tensor, Tensor]:
    def rounded(scales: Tensor) -> Tensor:
        return stored(scales, candidates.dtype, candidates.smallest)

    best = (torch.full_like(widest, torch.inf), first_scales, first_zeros)
    best = _better(best, groups, costs, first_scales, first_zeros, candidates)
    for factor in candidates.factors:
        best = _better(best, groups, costs, rounded(widest * factor), zeros, candidates)
    centre = best[1]
    for offset in candidates.offsets:
        scales = rounded(centre + widest * offset)
        for shift in candidates.shifts:
            shifted = (zeros + shift).clamp_(0, candidates.levels)
            best = _better(best, groups, costs, scales, shifted, candidates)
    return best[1], best[2]


def _better(best: Best, groups: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, candidates: Candidates) -> Best:
    """`best`, replaced by the candidate where its error is lower."""
    steps = groups / scales  # from the zero point
    codes = torch.round(steps)
    if candidates.symmetric:
        middle = (candidates.levels + 1) // 2
        codes.clamp_(-middle, candidates.levels - middle)
    else:
        codes.clamp_(-zeros, candidates.levels - zeros)
    error = codes.sub_(steps).square_().mul_(costs).sum(-1, keepdim=True) * scales.square()
    lower = error < best[0]
    return torch.where(lower, error, best[0]), torch.where(lower, scales, best[1]), torch.where(lower, zeros, best[2])
