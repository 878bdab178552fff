"""The definition of quantization with error compensation: NumPy and float64, one column at a time.

E experts, K columns in the order in which they are quantized, N rows of the weight, G groups.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def compensate(
    columns: Floats, upper: Floats, scales: Floats, zeros: Floats, group_of: NDArray[np.integer], levels: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Codes (E, K, N) uint8, and the weights (E, K, N) float64 just before they were quantized.

    columns   (E, K, N), the weight in the order of quantization
    upper     (E, K, K), the upper Cholesky factor U of H⁻¹ in that order; below the diagonal it is not read
    scales    (E, G, N)
    zeros     (E, G, N), zero points: integers, or any numbers where offsets are real; 2**(bits - 1) if symmetric
    group_of  (E, K), the group of each column
    levels    2**bits - 1
    """
    targets = columns.astype(np.float64)
    codes = np.empty(columns.shape, np.uint8)
    for e, (W, U) in enumerate(zip(targets, upper.astype(np.float64), strict=True)):
        for i, group in enumerate(group_of[e]):
            scale, zero = scales[e, group].astype(np.float64), zeros[e, group].astype(np.float64)  # (N,)
            code = np.clip(np.round(W[i] / scale + zero), 0, levels)  # ties go to the even code
            error = (W[i] - scale * (code - zero)) / U[i, i]
            W[i + 1 :] -= U[i, i + 1 :, None] * error
            codes[e, i] = code
    return codes, targets
