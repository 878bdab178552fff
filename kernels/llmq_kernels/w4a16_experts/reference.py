"""y[p] = x[token[p]] W[expert[p]]ᵀ + bias[expert[p]], each W[e] packed as in `w4a16.reference`: the definition.

A router sends each token to a few of E experts; each such *pair* of token and expert is one row of the result.  A
layer's first product has one row of x for each token, its second one for each pair.

P pairs, E experts, M rows of x, N out_features, K in_features, G groups.
"""

import numpy as np
from numpy.typing import NDArray

from llmq_kernels.w4a16 import reference


def experts(
    x: NDArray[np.floating],
    token: NDArray[np.integer],
    expert: NDArray[np.integer],
    words: NDArray[np.int16],
    scales: NDArray[np.floating],
    zeros: NDArray[np.int16] | None,
    bias: NDArray[np.floating] | None,
    *,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> NDArray[np.float64]:
    """The products (P, N) float64 of x (M, K), token (P,), expert (P,), words (E, N, Kp / 16 * bits) int16,
    scales (E, G, N), zeros (E, G, N) or None for 2**(bits - 1), bias (E, N) or None.
    """
    y = np.empty((len(token), words.shape[1]))
    for pair, (t, e) in enumerate(zip(token, expert, strict=True)):
        y[pair] = reference.linear(
            x[t], words[e], scales[e], None if zeros is None else zeros[e], None if bias is None else bias[e], None,
            bits=bits, in_features=in_features, columns_per_group=columns_per_group,
        )  # fmt: skip
    return y
