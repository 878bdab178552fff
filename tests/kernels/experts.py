"""Random arguments of the experts' op, and the check of a result."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16 import reference as linear_reference
from llmq_kernels.w4a16_experts import reference
from tests.kernels.cases import grouped, in_numpy, weight_in

HALF_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # in the last place
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

# Routings to four experts, and the number of tokens: for each expert, the tokens that are routed to it.
ROUTINGS: dict[str, tuple[int, list[list[int]]]] = {
    "spread": (3, [[0, 2], [1], [2], [0, 1]]),
    "some idle": (2, [[], [0], [], [1]]),
    "all in one": (17, [[], [], list(range(17)), []]),
    "twice the same": (2, [[1, 1, 1], [0], [], []]),
    "nothing": (2, [[], [], [], []]),
}


def arguments(
    routing: str = "spread",
    N: int = 40,
    K: int = 172,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """Random arguments of the op by name, the pairs shuffled; zeros go one step past the codes."""
    generator = torch.Generator().manual_seed(K + bits)
    M, tokens = ROUTINGS[routing]
    pairs = [(t, e) for e, own in enumerate(tokens) for t in own]
    order = torch.randperm(len(pairs), generator=generator)
    token, expert = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)[order].unbind(1)
    E, per_group = len(tokens), group or K
    G = -(-K // per_group)
    codes = torch.randint(0, 1 << bits, (E, N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, (1 << bits) + 1, (E, G, N), generator=generator, dtype=torch.int16)
    return {
        "x": torch.randn(M, K, generator=generator).to(dtype),
        "token": token.to(torch.int32),
        "expert": expert.contiguous(),
        "bias": torch.randn(E, N, generator=generator).to(dtype) if bias else None,
        "words": torch.stack([layout.pack(own, bits) for own in codes]),
        "scales": torch.randn(E, G, N, generator=generator).to(dtype),
        "zeros": None if symmetric else zeros,
        "bits": bits,
        "in_features": K,
        "columns_per_group": per_group,
    }


def weights_of(values: dict[str, Any]) -> NDArray[np.float64]:
    """(E, N, K) float64."""
    stack = weight_in(values)
    experts = (stack.with_arrays(lambda part, e=e: part[e]) for e in range(len(stack.words)))
    return np.stack([linear_reference.dequantize(expert) for expert in experts])


def assert_is_the_definition(y: Tensor, case: dict[str, Any]) -> None:
    """Within the bound of float32 sums of K products (see `test_w4a16.py`), and one rounding to the output's dtype.

    Tensor cores truncate sums instead of rounding them, so the bound on a GPU is twice as large.
    """
    values = in_numpy(case)
    expected = reference.experts(**grouped(values))
    W = np.abs(weights_of(values))[values["expert"]]  # (P, N, K)
    magnitude = np.einsum("pk,pnk->pn", np.abs(values["x"])[values["token"]], W)
    if values["bias"] is not None:
        magnitude += np.abs(values["bias"])[values["expert"]]
    error = (values["in_features"] + 4) * (2 if y.is_cuda else 1) * HALF_UNIT[torch.float32] * magnitude
    error += HALF_UNIT[y.dtype] * (np.abs(expected) + error) + SMALLEST[y.dtype]
    assert y.dtype == case["x"].dtype
    assert y.shape == expected.shape
    assert np.all(np.abs(y.double().cpu().numpy() - expected) <= error)
