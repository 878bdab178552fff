"""Codes of an affine grid in GGUF blocks: the same weights bit for bit, or an error."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.errors import FormatError
from llmq.formats.codecs import gguf_blocks
from llmq.gguf import export
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

GRIDS = st.builds(
    WeightScheme,
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group_size=st.sampled_from([32, 64, 128, 256, "channel", "tensor"]),
    symmetric=st.booleans(),
)


def random_tensor(scheme: WeightScheme, N: int, K: int, seed: int) -> QuantizedTensor:
    """Random codes and zero points, fp16 scales of both signs."""
    draw = np.random.default_rng(seed)
    G = K // scheme.columns_per_group(K)
    codes = torch.from_numpy(draw.integers(0, scheme.levels + 1, (N, K), dtype=np.uint8))
    scales = torch.from_numpy(draw.standard_normal((N, G)).astype(np.float16))
    zeros = None if scheme.symmetric else torch.from_numpy(draw.integers(0, scheme.levels + 1, (N, G), dtype=np.int16))
    return QuantizedTensor(codes, scales, zeros, scheme)


@given(scheme=GRIDS, seed=st.integers(0, 2**32 - 1))
def test_packed_blocks_decode_to_the_same_weights(scheme: WeightScheme, seed: int) -> None:
    q = random_tensor(scheme, 3, 512, seed)
    kind = export.best(scheme, 512)
    if scheme.bits == 8 and not scheme.symmetric:
        assert kind is None
        return
    assert kind is not None
    assert np.array_equal(gguf_blocks.decode(kind, export.pack(kind, q)), q.dequantize().numpy())


@pytest.mark.parametrize(
    ("scheme", "columns", "kind"),
    [
        (WeightScheme(4, 32, True), 96, "Q4_0"),
        (WeightScheme(4, 128, True), 256, "Q4_0"),
        (WeightScheme(3, 32, False), 96, "Q4_0"),  # code - zero has a sign, so it needs four bits
        (WeightScheme(4, 32, False), 256, "Q5_0"),
        (WeightScheme(4, 256, False), 512, "Q4_K"),
        (WeightScheme(4, "channel", False), 512, "Q4_K"),
        (WeightScheme(4, "channel", False), 96, "Q5_0"),
        (WeightScheme(8, 32, True), 96, "Q8_0"),
        (WeightScheme(8, 32, False), 96, None),
        (WeightScheme(4, 16, True), 96, None),
        (WeightScheme(4, "channel", True), 100, None),
    ],
)
def test_the_smallest_exact_type_is_chosen(scheme: WeightScheme, columns: int, kind: str | None) -> None:
    assert export.best(scheme, columns) == kind


def test_scales_that_are_not_fp16_are_refused() -> None:
    q = random_tensor(WeightScheme(4, 32, True), 2, 64, seed=0)
    small = q.scales.to(torch.bfloat16) * 2**-24
    with pytest.raises(FormatError, match="of its 4 scales are not fp16 numbers"):
        export.pack("Q4_0", dataclasses.replace(q, scales=small))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_index": torch.arange(64).flip(0) // 32}, "g_idx"),
        ({"zeros": torch.full((2, 2), 20, dtype=torch.int16)}, "expected -16 to 15"),  # in a damaged file
    ],
)
def test_other_mismatches_are_refused_when_packing(changes: dict[str, Any], message: str) -> None:
    q = random_tensor(WeightScheme(4, 32, False), 2, 64, seed=0)
    with pytest.raises(FormatError, match=message):
        export.pack("Q5_0", dataclasses.replace(q, **changes))


def test_a_group_index_in_natural_order_is_accepted() -> None:
    q = random_tensor(WeightScheme(4, 32, False), 2, 64, seed=0)
    ordered = dataclasses.replace(q, group_index=torch.arange(64, dtype=torch.int32) // 32)
    assert np.array_equal(export.pack("Q5_0", ordered), export.pack("Q5_0", q))
