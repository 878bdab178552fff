"""Which scales and zero points the search tries."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """levels is 2**bits - 1; `symmetric` fixes the zero point (shifts are then (0,)); `smallest` bounds every scale."""

    levels: int
    symmetric: bool
    factors: tuple[float, ...]
    offsets: tuple[float, ...]
    shifts: tuple[int, ...]
    smallest: float
    dtype: torch.dtype
