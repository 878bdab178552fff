"""The definition of a step: NumPy and float64."""

import numpy as np
from numpy.typing import NDArray

from llmq_kernels.tuning_step.rates import EPSILON, MEAN_DECAY, SQUARE_DECAY

Array = NDArray[np.float64]


def codes_at(origin: Array, v: Array, levels: int) -> Array:
    """clip(round(q₀ + v)), ties to even."""
    return np.clip(np.round(origin + v), 0, levels)


def step(
    gradient: Array, v: Array, mean: Array, square: Array, origin: Array, scales: Array, zeros: Array, levels: int,
    divisor: float, rate: float, number: int,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """The next v, mean, square and codes (N, K), and Σ G (q - z) of each group (N, G) at the codes before the step.

    `scales` and `zeros` are (N, G); steps are counted from 0.  G is `gradient` / `divisor`, 0 where not finite.
    """
    N, K = v.shape
    of_group = np.arange(K) // (K // scales.shape[1])
    G = gradient / divisor
    G = np.where(np.isfinite(G), G, 0.0)
    steps = codes_at(origin, v, levels) - zeros[:, of_group]
    sums = (G * steps).reshape(N, scales.shape[1], -1).sum(2)
    slope, place = G * scales[:, of_group], origin + v
    slope[(place > levels) & (slope < 0) | (place < 0) & (slope > 0)] = 0
    mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * slope
    square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * slope**2
    of_mean, of_square = 1 - MEAN_DECAY ** (number + 1), 1 - SQUARE_DECAY ** (number + 1)
    v = v - rate * (mean / of_mean) / (np.sqrt(square / of_square) + EPSILON)
    return v, mean, square, codes_at(origin, v, levels), sums
