"""The definition of y[p] = x[token[p]] W[expert[p]]ᵀ + bias[expert[p]], each W[e] packed as in `w4a16.reference`.

A router sends each token to a few of E experts; each *pair* of token and expert is one row of the result.  The first
product of a layer has one row of x per token, the second one per pair.

P pairs, E experts, M rows of x, N out_features, K in_features, G groups.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq_kernels.w4a16 import reference
from llmq_kernels.w4a16.packed_weight import PackedWeight

Array = NDArray[Any]


def experts(
    x: Array, token: Array, expert: Array, weight: PackedWeight[Array], bias: Array | None
) -> NDArray[np.float64]:
    """The products (P, N) float64 of float x (M, K), integer token (P,) and expert (P,), a stack of weights, and float
    bias (E, N) or None.
    """
    y = np.empty((len(token), weight.words.shape[1]))
    for pair, (t, e) in enumerate(zip(token, expert, strict=True)):
        y[pair] = reference.linear(x[t], _expert(weight, e), None if bias is None else bias[e])
    return y


def _expert(weight: PackedWeight[Array], e: int) -> PackedWeight[Array]:
    return weight.with_arrays(lambda stack: stack[e])
