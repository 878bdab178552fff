"""Random weights on a grid, and a check that two of them are equal."""

import torch

from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme


def random_weight(
    scheme: WeightScheme,
    N: int,
    K: int,
    *,
    scale_dtype: torch.dtype = torch.float32,
    shuffled: bool = False,
    seed: int = 0,
) -> QuantizedTensor:
    """Any codes, any zeros, scales of both signs; `shuffled` assigns columns to groups in a random order."""
    generator = torch.Generator().manual_seed(seed)
    G = K // scheme.columns_per_group(K)
    codes = torch.randint(0, scheme.levels + 1, (N, K), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(N, G, generator=generator) * 0.1).to(scale_dtype)
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.levels + 1, (N, G), generator=generator).to(torch.int16)
    index = None
    if shuffled:
        columns = torch.randperm(K, generator=generator) // scheme.columns_per_group(K)
        index = columns.to(torch.int32)
    return QuantizedTensor(codes, scales, zeros, scheme, index)


def assert_same(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    """Every field is equal, including dtype and layout."""
    assert actual.scheme == expected.scheme
    for field in ("codes", "scales", "zeros", "group_index"):
        ours, theirs = getattr(actual, field), getattr(expected, field)
        assert (ours is None) == (theirs is None), field
        if theirs is not None:
            assert ours.dtype == theirs.dtype, field
            assert ours.equal(theirs), field
            assert ours.is_contiguous(), field
