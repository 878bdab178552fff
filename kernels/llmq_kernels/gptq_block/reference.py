"""Rounding with compensation: the definition.  NumPy and float64, one column at a time over all that follow.

Shapes: E experts, K columns in the order in which they are visited, N rows of the weight, G groups.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def compensate(
    columns: Floats, upper: Floats, scales: Floats, zeros: Floats, group_of: NDArray[np.integer], levels: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Codes (E, K, N) uint8, and the weights (E, K, N) float64 as they were when their turn came.

    columns   (E, K, N), the weight in visiting order
    upper     (E, K, K), the upper Cholesky factor U of H⁻¹ in visiting order; what is below the diagonal is not read
    scales    (E, G, N)
    zeros     (E, G, N), integers, or in a grid with real offsets any numbers; 2**(bits - 1) where symmetric
    group_of  (E, K), the group of each visited column
    levels    2**bits - 1
    """
    targets = columns.astype(np.float64)
    codes = np.empty(columns.shape, np.uint8)
    for e, (W, U) in enumerate(zip(targets, upper.astype(np.float64), strict=True)):
        for i, group in enumerate(group_of[e]):
            scale, zero = scales[e, group].astype(np.float64), zeros[e, group].astype(np.float64)  # (N,) each
            code = np.clip(np.round(W[i] / scale + zero), 0, levels)  # halves go to the even code
            error = (W[i] - scale * (code - zero)) / U[i, i]
            W[i + 1 :] -= U[i, i + 1 :, None] * error
            codes[e, i] = code
    return codes, targets
