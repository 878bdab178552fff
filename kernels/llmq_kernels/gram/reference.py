"""The definition of XᵀX: NumPy and float64."""

import numpy as np
from numpy.typing import NDArray


def second_moment(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """x (T, K) -> XᵀX (K, K) float64."""
    X = x.astype(np.float64)
    product: NDArray[np.float64] = X.T @ X
    return product
