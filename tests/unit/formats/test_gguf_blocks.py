"""GGUF blocks, compared with the package gguf, and packed and unpacked again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.errors import FormatError
from llmq.formats.codecs import gguf_blocks, gguf_iq4, gguf_k_quants

gguf = pytest.importorskip("gguf")
SEEDS = st.integers(0, 2**32 - 1)


def _same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    number = ~np.isnan(expected)  # the bits of a NaN depend on the processor
    assert np.array_equal(np.isnan(actual), ~number)
    assert np.array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize("kind", gguf_blocks.SIZES)
@given(seed=SEEDS)
def test_random_bytes_decode_as_in_the_package_gguf(kind: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (3, gguf_blocks.row_bytes(kind, 512)), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    _same(gguf_blocks.decode(kind, raw), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "BF16", "F16"])
@given(seed=SEEDS)
def test_packing_gives_the_bytes_of_the_package_gguf(kind: str, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((3, 96)).astype(np.float32)
    stored = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    if kind in {"BF16", "F16"}:
        assert np.array_equal(gguf_blocks.pack_float(kind, weight), stored)
        return
    d = stored.reshape(-1, gguf_blocks.SIZES[kind][1])[:, :2]
    scales = np.ascontiguousarray(d).view(np.float16).reshape(3, -1)
    decoded = gguf_blocks.decode(kind, stored).reshape(3, -1, 32)
    codes = np.rint(decoded / scales.astype(np.float32)[..., None]).reshape(3, 96)
    codes += {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
    pack = getattr(gguf_blocks, f"pack_{kind.lower()}")
    assert np.array_equal(pack(codes.astype(np.int8 if kind == "Q8_0" else np.uint8), scales), stored)


@pytest.mark.parametrize("kind", [*gguf_k_quants.SIZES, *gguf_iq4.SIZES])
@given(seed=SEEDS)
def test_unpacked_blocks_are_packed_to_the_same_bytes(kind: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (3, gguf_blocks.row_bytes(kind, 512)), dtype=np.uint8)
    codec = gguf_iq4 if kind in gguf_iq4.SIZES else gguf_k_quants
    parts = getattr(codec, f"unpack_{kind.lower()}")(raw)
    again = getattr(codec, f"pack_{kind.lower()}")(**vars(parts))
    assert np.array_equal(again, raw)


def test_values_that_do_not_fit_are_refused() -> None:
    codes, d = np.full((1, 32), 16, dtype=np.uint8), np.ones((1, 1), dtype=np.float16)
    with pytest.raises(FormatError, match="16, this type holds 0 to 15"):
        gguf_blocks.pack_q4_0(codes, d)
    with pytest.raises(FormatError, match="multiple of 256"):
        gguf_blocks.row_bytes("Q4_K", 128)
    with pytest.raises(FormatError, match="IQ2_XS"):
        gguf_blocks.decode("IQ2_XS", codes)
    sc = np.full((1, 8), 64, dtype=np.uint8)
    with pytest.raises(FormatError, match="6 bits"):
        gguf_k_quants.pack_q4_k(np.zeros((1, 256), dtype=np.uint8), d, d, sc, sc)
    with pytest.raises(FormatError, match="6 bits"):
        gguf_iq4.pack_iq4_xs(np.zeros((1, 256), dtype=np.uint8), d, np.full((1, 8), 32, dtype=np.int8))
    with pytest.raises(FormatError, match="no scales of sub-blocks"):
        gguf_iq4.pack_iq4_nl(codes, d, np.full((1, 1), 2, dtype=np.int8))
    with pytest.raises(FormatError, match="16, this type holds 0 to 15"):
        gguf_iq4.pack_iq4_nl(codes, d, np.ones((1, 1), dtype=np.int8))
    d, codes, sc = d[:, :1], np.zeros((1, 256), dtype=np.uint8), np.zeros((1, 16), dtype=np.int8)
    for wrong in (-33, 32):
        with pytest.raises(FormatError, match="6 bits"):
            gguf_k_quants.pack_q3_k(codes, d, sc + np.int8(wrong))
    with pytest.raises(FormatError, match="4 bits"):
        gguf_k_quants.pack_q2_k(codes, d, d, np.abs(sc), np.abs(sc) + np.uint8(16))
