"""The definition of the search, for one group, one candidate after the other: NumPy, errors in float64."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def error(group: NDArray[np.float32], costs: NDArray[np.float32], scale: float, zero: float, levels: int) -> float:
    """Σ_j cost_j (ŵ_j - w_j)² of a group (g,) quantized to scale * (code - zero), in float64."""
    w = group.astype(np.float64)
    code = np.clip(np.round(w / scale) + zero, 0, levels)
    return float((costs.astype(np.float64) * (scale * (code - zero) - w) ** 2).sum())


def search(
    group: NDArray[np.float32],
    costs: NDArray[np.float32],
    first: tuple[float, float],
    widest: float,
    zero: float,
    levels: int,
    factors: Sequence[float],
    offsets: Sequence[float],
    shifts: Sequence[int],
) -> tuple[float, float]:
    """(scale, zero) of the least error for a group (g,); scales are not rounded to fewer than 24 bits here."""
    best, best_error = first, error(group, costs, *first, levels)

    def consider(scale: np.float32, candidate: float) -> None:
        nonlocal best, best_error
        candidate_error = error(group, costs, float(scale), candidate, levels)
        if candidate_error < best_error:
            best, best_error = (float(scale), candidate), candidate_error

    for factor in factors:
        consider(np.float32(widest) * np.float32(factor), zero)
    centre = np.float32(best[0])
    for offset in offsets:
        for shift in shifts:
            scale = centre + np.float32(widest) * np.float32(offset)
            consider(scale, float(np.clip(zero + shift, 0, levels)))
    return best
