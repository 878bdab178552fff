"""The packed layout: words worked out by hand from the diagram in `reference.py`, round trips, and the torch twin."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import layout, reference

BITS = (2, 3, 4, 5, 6, 7, 8)

# bits: {column: code} and {word: unsigned value}; every other code and word is 0.  In a plane of b bits, column c is
# field c // (8 b) of word c % (8 b), and field j starts at bit j b.
HAND_PACKED = {
    2: (
        {0: 3, 16: 1, 32: 2, 112: 3, 17: 2, 127: 1},
        # columns 0, 16, 32, 112 are fields 0, 1, 2, 7 of word 0: 3 + (1 << 2) + (2 << 4) + (3 << 14)
        {0: 0xC027, 1: 0x0008, 15: 0x4000},
    ),
    3: (
        {0: 5, 17: 6, 127: 7, 8: 4, 3: 3},
        # 2-bit plane: column 0 holds 1, column 17 = 16 + 1 holds 2, column 127 = 7 * 16 + 15 holds 3, column 3 holds 3.
        # 1-bit plane after 16 words: column 0 is word 0 bit 0, 8 is word 0 bit 1, 17 = 2 * 8 + 1 is word 1 bit 2,
        # 127 = 15 * 8 + 7 is word 7 bit 15.
        {0: 0x0001, 1: 0x0008, 3: 0x0003, 15: 0xC000, 16: 0x0003, 17: 0x0004, 23: 0x8000},
    ),
    4: (
        {0: 1, 32: 2, 64: 3, 96: 4, 1: 15, 33: 8, 127: 15},
        {0: 0x4321, 1: 0x008F, 31: 0xF000},
    ),
    5: (  # the 4-bit plane as above, then 8 words of the 1-bit plane: columns 0 and 127 have bit 4
        {0: 17, 32: 2, 127: 31},
        {0: 0x0021, 31: 0xF000, 32: 0x0001, 39: 0x8000},
    ),
    6: (  # then 16 words of the 2-bit plane: column 17 = 16 + 1 holds 2 in bits 4 and 5
        {0: 49, 17: 36, 127: 63},
        {0: 0x0001, 17: 0x0004, 31: 0xF000, 32: 0x0003, 33: 0x0008, 47: 0xC000},
    ),
    7: (  # the 2-bit plane, then 8 words of the 1-bit plane
        {0: 113, 17: 100, 127: 127},
        {0: 0x0001, 17: 0x0004, 31: 0xF000, 32: 0x0003, 33: 0x0008, 47: 0xC000, 48: 0x0001, 49: 0x0004, 55: 0x8000},
    ),
    8: (
        {0: 0x12, 64: 0xAB, 63: 0xFF, 65: 0x80, 127: 0x01},
        {0: 0xAB12, 1: 0x8000, 63: 0x01FF},
    ),
}  # fmt: skip


def random_codes(N: int, K: int, bits: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 1 << bits, (N, K), dtype=np.uint8)


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_words_match_the_diagram(bits: int, tile: int) -> None:
    by_column, by_word = HAND_PACKED[bits]
    codes = np.zeros((1, 256), np.uint8)
    words = np.zeros((1, 16 * bits), np.uint16)
    for column, code in by_column.items():
        codes[0, 128 * tile + column] = code
    for word, value in by_word.items():
        words[0, 8 * bits * tile + word] = value
    np.testing.assert_array_equal(reference.pack(codes, bits).view(np.uint16), words)
    np.testing.assert_array_equal(reference.unpack(words.view(np.int16), bits, 256), codes)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_code_zero(bits: int) -> None:
    words = reference.pack(np.full((1, 1), 1, np.uint8), bits)
    assert words.shape == (1, 8 * bits)
    assert words[0, 0] == 1
    assert not words[0, 1:].any()


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_reference_round_trip(bits: int, N: int, K: int, seed: int) -> None:
    codes = random_codes(N, K, bits, seed)
    words = reference.pack(codes, bits)
    assert words.shape == (N, -(-K // 128) * 8 * bits)
    np.testing.assert_array_equal(reference.unpack(words, bits, K), codes)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_torch_layout_equals_the_reference(bits: int, N: int, K: int, seed: int) -> None:
    codes = random_codes(N, K, bits, seed)
    expected = reference.pack(codes, bits)
    words = layout.pack(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(words.numpy(), expected)
    np.testing.assert_array_equal(layout.unpack(torch.from_numpy(expected), bits, K).numpy(), codes)


@given(st.sampled_from(BITS), st.integers(0, 2**32 - 1))
def test_any_words_unpack_and_pack_again(bits: int, seed: int) -> None:
    """The layout is dense: any words can be unpacked, and are packed to the same words."""
    words = np.random.default_rng(seed).integers(-(1 << 15), 1 << 15, (3, 16 * bits), dtype=np.int16)
    np.testing.assert_array_equal(layout.pack(layout.unpack(torch.from_numpy(words), bits, 256), bits).numpy(), words)


@pytest.mark.parametrize("bits", BITS)
def test_pieces_bound_the_memory(bits: int, monkeypatch: pytest.MonkeyPatch, largest_tensor: Any) -> None:
    monkeypatch.setattr(layout, "CODES_AT_ONCE", 3 * 256)
    codes = random_codes(200, 250, bits)
    with largest_tensor:
        words = layout.pack(torch.from_numpy(codes), bits)
        unpacked = layout.unpack(words, bits, 250)
    np.testing.assert_array_equal(words.numpy(), reference.pack(codes, bits))
    np.testing.assert_array_equal(unpacked.numpy(), codes)
    assert largest_tensor.bytes <= 200 * 256  # the codes themselves (or 8-bit words); an int16 copy would be twice that


def test_strided_tensors_pack() -> None:
    codes = random_codes(130, 6, 4)
    words = layout.pack(torch.from_numpy(codes).t(), 4)
    np.testing.assert_array_equal(words.numpy(), reference.pack(np.ascontiguousarray(codes.T), 4))
    both = torch.stack([words, words], dim=2)[:, :, 0]
    np.testing.assert_array_equal(layout.unpack(both, 4, 130).numpy(), codes.T)


def test_no_rows_pack_to_no_words() -> None:
    words = layout.pack(torch.empty(0, 130, dtype=torch.uint8), 3)
    assert words.shape == (0, 48)
    assert layout.unpack(words, 3, 130).shape == (0, 130)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_too_large_is_refused(bits: int) -> None:
    codes = np.full((2, 5), 1 << bits, np.uint8)
    for pack in (lambda: reference.pack(codes, bits), lambda: layout.pack(torch.from_numpy(codes), bits)):
        with pytest.raises(KernelInputError, match=f"a code is {1 << bits}, expected at most {(1 << bits) - 1}"):
            pack()


def test_a_weight_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value of the GPU waits for it; the last of many pieces is checked too."""
    monkeypatch.setattr(layout, "CODES_AT_ONCE", 5)
    read: list[int] = []
    monkeypatch.setattr(layout, "_refuse_large", lambda largest, bits: read.append(largest))
    codes = torch.zeros(9, 5, dtype=torch.uint8)
    codes[-1, -1] = 16
    layout.pack(codes, 4)
    assert read == [16]


def test_a_width_without_layout_is_refused() -> None:
    codes = np.zeros((1, 5), np.uint8)
    for pack in (lambda: reference.pack(codes, 9), lambda: layout.pack(torch.from_numpy(codes), 9)):
        with pytest.raises(KernelInputError, match="bits is 9, expected one of 2, 3, 4, 5, 6, 7, 8"):
            pack()


@pytest.mark.parametrize("words", [torch.zeros(2, 31, dtype=torch.int16), torch.zeros(2, 32, dtype=torch.int32)])
def test_words_of_another_shape_or_dtype_are_refused(words: torch.Tensor) -> None:
    with pytest.raises(KernelInputError, match=r"expected torch.int16 \(N, 32\)"):
        layout.unpack(words, 4, 100)


def test_codes_of_another_dtype_are_refused() -> None:
    with pytest.raises(KernelInputError, match=r"expected torch.uint8 \(N, K\)"):
        layout.pack(torch.zeros(2, 5, dtype=torch.int32), 4)
