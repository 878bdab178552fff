"""The blocks of GGUF: 32 weights of a row with their scale, one block after the other along K.

    F32, F16, BF16   one weight, 4 or 2 bytes
    Q4_0   18 bytes  fp16 d, 16 bytes of nibbles                          w = d * (q - 8)
    Q4_1   20        fp16 d, fp16 m, nibbles                              w = d * q + m
    Q5_0   22        fp16 d, 32 fifth bits, nibbles                       w = d * (q - 16)
    Q5_1   24        fp16 d, fp16 m, fifth bits, nibbles                  w = d * q + m
    Q8_0   34        fp16 d, 32 bytes of signed codes                     w = d * q
    Q2_K to Q6_K      256 weights per block: `formats/codecs/gguf_k_quants.py`
    IQ4_NL, IQ4_XS    `formats/codecs/gguf_iq4.py`

q are the codes (quantized values).  Byte j of the nibbles holds weight j in its low half and weight j + 16 in its high
half.  The fifth bits are one little-endian number whose bit j belongs to weight j.  Everything is computed in float32,
in the same order of operations as in llama.cpp (`ggml-quants.c`, and `gguf.quants`, with which the tests compare bit
for bit).

Arrays are rows of bytes, (N, bytes of a row) uint8, as in the file.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError
from llmq.formats.codecs import gguf_iq4, gguf_k_quants

Bytes = NDArray[Any]  # (N, bytes of a row) uint8; in NumPy's type hints `bytes & 15` is wider than uint8
Codes = NDArray[Any]  # (N, K) uint8
Halves = NDArray[np.float16]  # (N, blocks of a row)
Floats = NDArray[np.float32]  # (N, K)

SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F32": (1, 4),
        "F16": (1, 2),
        "BF16": (1, 2),
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        **gguf_k_quants.SIZES,
        **gguf_iq4.SIZES,
    }
)
"""Type -> weights per block, bytes per block."""

QUANTIZED = frozenset(SIZES) - {"F32", "F16", "BF16"}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` weights.  Raises FormatError for an unknown type or an incomplete block."""
    weights, size = _size(kind)
    if columns % weights:
        raise FormatError(
            f"{kind} needs rows of a multiple of {weights} weights, these have {columns}",
            hint="Q4_0, Q5_0 and Q8_0 need multiples of 32; F16 takes any",
        )
    return columns // weights * size


def row_weights(kind: str, stored: int) -> int:
    """The inverse of `row_bytes`: weights in a row of `stored` bytes."""
    weights, size = _size(kind)
    if stored % size:
        raise FormatError(f"{kind} has blocks of {size} bytes, a row has {stored}", hint="is the file complete?")
    return stored // size * weights


def decode(kind: str, raw: Bytes) -> Floats:
    """(N, bytes of a row) uint8 -> (N, K) float32.  Raises FormatError for a type that is not in `SIZES`."""
    columns = row_weights(kind, raw.shape[1])
    rows = np.ascontiguousarray(raw)
    if kind in gguf_k_quants.SIZES:
        return gguf_k_quants.decode(kind, rows)
    if kind in gguf_iq4.SIZES:
        return gguf_iq4.decode(kind, rows)
    if kind in _PLAIN:
        return _PLAIN[kind](rows)
    blocks = rows.reshape(-1, SIZES[kind][1])  # (B, bytes)
    with np.errstate(invalid="ignore"):  # a file may hold NaN, which is passed on
        return _BLOCKS[kind](blocks).reshape(len(rows), columns)


def pack_q4_0(codes: Codes, d: Halves) -> Bytes:
    """Codes 0..15, w = d * (codes - 8); (N, K) and (N, K/32) -> (N, K/32 * 18)."""
    blocks, N = _blocks(codes, 15), len(codes)
    return _joined(N, _bytes(d), _nibbles(blocks))


def pack_q4_1(codes: Codes, d: Halves, m: Halves) -> Bytes:
    """Codes 0..15, w = d * codes + m; (N, K) and two (N, K/32) -> (N, K/32 * 20)."""
    blocks, N = _blocks(codes, 15), len(codes)
    return _joined(N, _bytes(d), _bytes(m), _nibbles(blocks))


def pack_q5_0(codes: Codes, d: Halves) -> Bytes:
    """Codes 0..31, w = d * (codes - 16); (N, K) and (N, K/32) -> (N, K/32 * 22)."""
    blocks = _blocks(codes, 31)
    return _joined(len(codes), _bytes(d), _fifth(blocks), _nibbles(blocks & 15))


def pack_q8_0(codes: NDArray[np.int8], d: Halves) -> Bytes:
    """Signed codes, w = d * codes; (N, K) int8 and (N, K/32) -> (N, K/32 * 34)."""
    blocks = np.ascontiguousarray(codes, dtype=np.int8).reshape(-1, 32).view(np.uint8)
    return _joined(len(codes), _bytes(d), blocks)


def unpack_q4_0(raw: Bytes) -> tuple[Codes, Halves]:
    """The inverse of `pack_q4_0`."""
    blocks = raw.reshape(-1, SIZES["Q4_0"][1])
    return _low(blocks[:, 2:]).reshape(len(raw), -1), _halves(len(raw), blocks)


def unpack_q4_1(raw: Bytes) -> tuple[Codes, Halves, Halves]:
    """The inverse of `pack_q4_1`."""
    blocks = raw.reshape(-1, SIZES["Q4_1"][1])
    return _low(blocks[:, 4:]).reshape(len(raw), -1), _halves(len(raw), blocks), _halves(len(raw), blocks[:, 2:])


def unpack_q5_0(raw: Bytes) -> tuple[Codes, Halves]:
    """The inverse of `pack_q5_0`."""
    blocks = raw.reshape(-1, SIZES["Q5_0"][1])
    return _with_fifth(blocks[:, 2:6], blocks[:, 6:]).reshape(len(raw), -1), _halves(len(raw), blocks)


def unpack_q8_0(raw: Bytes) -> tuple[NDArray[np.int8], Halves]:
    """The inverse of `pack_q8_0`."""
    blocks = raw.reshape(-1, SIZES["Q8_0"][1])
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(len(raw), -1), _halves(len(raw), blocks)


def pack_float(kind: str, weight: Floats) -> Bytes:
    """(N, K) float32 -> F32, F16 or BF16, rounded to nearest; the caller checks the range of F16."""
    if kind == "BF16":
        return _nearest_bfloat16(weight).view(np.uint8)
    with np.errstate(over="ignore"):  # too large values become infinite
        return np.ascontiguousarray(weight.astype({"F32": np.float32, "F16": np.float16}[kind])).view(np.uint8)


def _size(kind: str) -> tuple[int, int]:
    if kind not in SIZES:
        raise FormatError(
            f"GGUF type {kind} is not among {', '.join(SIZES)}",
            hint="llama.cpp's `llama-quantize --allow-requantize` converts it to one of these",
        )
    return SIZES[kind]


def _blocks(codes: Codes, largest: int) -> Codes:
    if codes.shape[1] % 32:
        raise FormatError(f"a row has {codes.shape[1]} weights, expected a multiple of 32")
    if codes.size and int(codes.max()) > largest:
        raise FormatError(f"a code is {int(codes.max())}, this type holds 0 to {largest}")
    return codes.reshape(-1, 32)


def _bytes(scales: Halves) -> Bytes:
    """(N, blocks) fp16 -> (B, 2)."""
    return np.ascontiguousarray(scales, dtype=np.float16).reshape(-1, 1).view(np.uint8)


def _halves(rows: int, blocks: Bytes) -> Halves:
    """(B, bytes) whose first two are fp16 -> (N, blocks of a row)."""
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).reshape(rows, -1)


def _joined(rows: int, *parts: Bytes) -> Bytes:
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _nibbles(blocks: Codes) -> Bytes:
    """(B, 32) codes below 16 -> (B, 16)."""
    nibbles: Bytes = blocks[:, :16] | (blocks[:, 16:] << 4)
    return nibbles


def _fifth(blocks: Codes) -> Bytes:
    """(B, 32) codes below 32 -> (B, 4)."""
    packed: Bytes = np.packbits(blocks >> 4, axis=1, bitorder="little")
    return packed


def _low(nibbles: Bytes) -> Codes:
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1)


def _with_fifth(high: Bytes, nibbles: Bytes) -> Codes:
    codes: Codes = _low(nibbles) | (np.unpackbits(high, axis=1, bitorder="little") << 4)
    return codes


def _half(pair: Bytes) -> Floats:
    """(B, 2) bytes -> (B, 1) float32."""
    return np.ascontiguousarray(pair).view(np.float16).astype(np.float32)


def _signed(codes: Codes, middle: int) -> Floats:
    return (codes.astype(np.int8) - np.int8(middle)).astype(np.float32)


def _nearest_bfloat16(weight: Floats) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16  # ties to even
    return np.where(np.isnan(weight), (bits >> 16) | 64, rounded).astype(np.uint16)


_PLAIN: Mapping[str, Callable[[Bytes], Floats]] = MappingProxyType(
    {
        "F32": lambda rows: rows.view(np.float32).copy(),
        "F16": lambda rows: rows.view(np.float16).astype(np.float32),
        "BF16": lambda rows: (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    }
)
_BLOCKS: Mapping[str, Callable[[Bytes], Floats]] = MappingProxyType(
    {
        "Q4_0": lambda b: _half(b[:, :2]) * _signed(_low(b[:, 2:]), 8),
        "Q4_1": lambda b: _half(b[:, :2]) * _low(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4]),
        "Q5_0": lambda b: _half(b[:, :2]) * _signed(_with_fifth(b[:, 2:6], b[:, 6:]), 16),
        "Q5_1": lambda b: _half(b[:, :2]) * _with_fifth(b[:, 4:8], b[:, 8:]).astype(np.float32) + _half(b[:, 2:4]),
        "Q8_0": lambda b: _half(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32),
    }
)
