"""The K-quants of GGUF: 256 weights of a row in sub-blocks whose scales are small integers times one fp16 number.

    Q2_K    84 bytes  16 bytes: sc (low half), m (high half) of 16 sub-blocks of 16, 64 of pairs of bits, fp16 d, dmin
    Q3_K   110        32 bytes of third bits, 64 of pairs of bits, 12 bytes: sc of 16 sub-blocks of 16, fp16 d
    Q4_K   144        fp16 d, fp16 dmin, 12 bytes: sc and m of 8 sub-blocks of 32, 128 of nibbles
    Q5_K   176        the same with 32 bytes of fifth bits in front of the nibbles
    Q6_K   210        128 low nibbles, 64 of high pairs of bits, sc of 16 sub-blocks of 16 (int8), fp16 d

    Q2_K, Q4_K, Q5_K  w = (d * sc[i]) * q - (dmin * m[i]),  sc, m in 0..63, in Q2_K in 0..15
    Q3_K, Q6_K        w = (d * sc[i]) * (q - middle),       middle 4 or 32, sc in -32..31 or -128..127

q are the codes (quantized values), of as many bits as the name says.  The 12 bytes of Q4_K and Q5_K hold 16 numbers of
6 bits.  The low six bits of bytes i and i + 4 (i < 4) are sc[i] and m[i].  Their top two bits are the top bits of
sc[i + 4] and m[i + 4]; the low four bits of these are the halves of byte i + 8.  The 12 bytes of Q3_K hold sc + 32: the
halves of byte i (i < 8) are the low four bits of i and i + 8, and the pairs of bits of byte i + 8 (i < 4) are the top
bits of i, i + 4, i + 8 and i + 12.

The order of the weights of a block, in chunks of 64 with t = 0..3 (Q4_K, Q5_K), of 128 with t = 0..1 (others):

    Q4_K   byte 32 t + l: low half weight 64 t + l, high half weight 64 t + 32 + l        (l < 32)
    Q5_K   fifth bits of those: bits 2 t and 2 t + 1 of byte l
    Q6_K   byte 64 t + l of the low nibbles (l < 64): weights 128 t + l and 128 t + 64 + l;
           byte 32 t + l of the high ones (l < 32): two bits each of weights 128 t + l + (0, 32, 64, 96)
    Q2_K   byte 32 t + l: as the high ones of Q6_K
    Q3_K   the same, and third bits of those: bits 4 t + (0, 1, 2, 3) of byte l
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError
from llmq.formats.codecs.gguf_rows import split_blocks

WEIGHTS = 256
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "Q2_K": (WEIGHTS, 84),
        "Q3_K": (WEIGHTS, 110),
        "Q4_K": (WEIGHTS, 144),
        "Q5_K": (WEIGHTS, 176),
        "Q6_K": (WEIGHTS, 210),
    }
)

Bytes = NDArray[Any]  # uint8; in NumPy's type hints `bytes & 15` is wider than uint8
Codes = NDArray[Any]  # uint8
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Minima:
    """A weight in Q2_K, Q4_K or Q5_K: w = (d * sc) * codes - (dmin * m), S = K/256 blocks per row.

    codes (N, K) uint8; d, dmin (N, S) float16; sc, m (N, 8 S) uint8 at most 63, in Q2_K (N, 16 S) at most 15
    """

    codes: Codes
    d: Halves
    dmin: Halves
    sc: Codes
    m: Codes


@dataclass(frozen=True)
class Centred:
    """A weight in Q3_K or Q6_K: w = (d * sc) * (codes - middle), the middle 4 or 32.

    codes (N, K) uint8; d (N, S) float16; sc (N, 16 S) int8
    """

    codes: Codes
    d: Halves
    sc: NDArray[np.int8]


def pack_q2_k(codes: Codes, d: Halves, dmin: Halves, sc: Codes, m: Codes) -> Bytes:
    """(N, K) codes 0..3, (N, K/256) d and dmin, (N, K/16) sc and m 0..15 -> (N, K/256 * 84) uint8."""
    _check(codes, 3)
    _require_bits(sc, m, bits=4)
    numbers = sc.astype(np.uint8).reshape(-1, 16) | (m.astype(np.uint8).reshape(-1, 16) << 4)
    return np.concatenate((numbers, _pack_pairs(codes), _bytes(d), _bytes(dmin)), axis=1).reshape(len(codes), -1)


def pack_q3_k(codes: Codes, d: Halves, sc: NDArray[np.int8]) -> Bytes:
    """(N, K) codes 0..7, (N, K/256) d, (N, K/16) sc -32..31 -> (N, K/256 * 110) uint8."""
    _check(codes, 7)
    third = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    stored = sc.astype(np.int16).reshape(-1, 16) + 32
    _require_bits(stored, bits=6)
    low, high = stored.astype(np.uint8) & 15, (stored.astype(np.uint8) >> 4).reshape(-1, 4, 4)
    numbers = np.concatenate((low[:, :8] | (low[:, 8:] << 4), _joined_pairs(high)), axis=1)
    return np.concatenate((third, _pack_pairs(codes & 3), numbers, _bytes(d)), axis=1).reshape(len(codes), -1)


def pack_q4_k(codes: Codes, d: Halves, dmin: Halves, sc: Codes, m: Codes) -> Bytes:
    """(N, K) codes 0..15, (N, K/256) d and dmin, (N, K/32) sc and m 0..63 -> (N, K/256 * 144) uint8."""
    _check(codes, 15)
    parts = (_bytes(d), _bytes(dmin), _pack_six(sc, m), _pack_nibbles(codes, 32))
    return np.concatenate(parts, axis=1).reshape(len(codes), -1)


def pack_q5_k(codes: Codes, d: Halves, dmin: Halves, sc: Codes, m: Codes) -> Bytes:
    """(N, K) codes 0..31, the rest as in `pack_q4_k` -> (N, K/256 * 176) uint8."""
    _check(codes, 31)
    fifth = np.packbits((codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    parts = (_bytes(d), _bytes(dmin), _pack_six(sc, m), fifth, _pack_nibbles(codes & 15, 32))
    return np.concatenate(parts, axis=1).reshape(len(codes), -1)


def pack_q6_k(codes: Codes, d: Halves, sc: NDArray[np.int8]) -> Bytes:
    """(N, K) codes 0..63, (N, K/256) d, (N, K/16) sc -> (N, K/256 * 210) uint8."""
    _check(codes, 63)
    scales = np.ascontiguousarray(sc, dtype=np.int8).reshape(-1, 16).view(np.uint8)
    parts = (_pack_nibbles(codes & 15, 64), _pack_pairs(codes >> 4), scales, _bytes(d))
    return np.concatenate(parts, axis=1).reshape(len(codes), -1)


def unpack_q2_k(raw: Bytes) -> Minima:
    """The inverse of `pack_q2_k`."""
    blocks = split_blocks("Q2_K", SIZES["Q2_K"][1], raw)
    numbers, codes = blocks[:, :16], _unpack_pairs(blocks[:, 16:80])
    return _minima(len(raw), codes, blocks[:, 80:82], blocks[:, 82:84], numbers & 15, numbers >> 4)


def unpack_q3_k(raw: Bytes) -> Centred:
    """The inverse of `pack_q3_k`."""
    blocks, N = split_blocks("Q3_K", SIZES["Q3_K"][1], raw), len(raw)
    third = np.unpackbits(blocks[:, None, :32], axis=1, bitorder="little").reshape(-1, WEIGHTS)
    codes = _unpack_pairs(blocks[:, 32:96]) | (third << 2)
    low, high = blocks[:, 96:104], _split_pairs(blocks[:, 104:108]).reshape(-1, 16)
    scales = (np.concatenate((low & 15, low >> 4), axis=1) | (high << 4)).astype(np.int8) - np.int8(32)
    return Centred(codes.reshape(N, -1), _halves(N, blocks[:, 108:]), scales.reshape(N, -1))


def unpack_q4_k(raw: Bytes) -> Minima:
    """The inverse of `pack_q4_k`."""
    blocks = split_blocks("Q4_K", SIZES["Q4_K"][1], raw)
    return _minima(len(raw), _unpack_nibbles(blocks[:, 16:], 32), blocks[:, :2], blocks[:, 2:4], *_six(blocks))


def unpack_q5_k(raw: Bytes) -> Minima:
    """The inverse of `pack_q5_k`."""
    blocks = split_blocks("Q5_K", SIZES["Q5_K"][1], raw)
    fifth = np.unpackbits(blocks[:, None, 16:48], axis=1, bitorder="little").reshape(-1, WEIGHTS)
    codes = _unpack_nibbles(blocks[:, 48:], 32) | (fifth << 4)
    return _minima(len(raw), codes, blocks[:, :2], blocks[:, 2:4], *_six(blocks))


def unpack_q6_k(raw: Bytes) -> Centred:
    """The inverse of `pack_q6_k`."""
    blocks, N = split_blocks("Q6_K", SIZES["Q6_K"][1], raw), len(raw)
    codes = _unpack_nibbles(blocks[:, :128], 64) | (_unpack_pairs(blocks[:, 128:192]) << 4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return Centred(codes.reshape(N, -1), _halves(N, blocks[:, 208:]), scales.reshape(N, -1))


def decode_minima(w: Minima) -> Floats:
    """(N, K) float32."""
    N, K = w.codes.shape
    S = w.d.shape[1]
    with np.errstate(invalid="ignore"):  # a file may hold NaN, which is passed on
        scale = w.d.astype(np.float32)[:, :, None] * w.sc.reshape(N, S, -1).astype(np.float32)  # (N, S, sub-blocks)
        least = w.dmin.astype(np.float32)[:, :, None] * w.m.reshape(N, S, -1).astype(np.float32)
        codes = w.codes.reshape(*scale.shape, -1).astype(np.float32)
        codes *= scale[..., None]
        codes -= least[..., None]
    return codes.reshape(N, K)


def decode_centred(w: Centred, middle: int) -> Floats:
    """(N, K) float32."""
    N, K = w.codes.shape
    with np.errstate(invalid="ignore"):
        scale = w.d.astype(np.float32)[:, :, None] * w.sc.reshape(N, -1, 16).astype(np.float32)  # (N, S, 16)
        codes = w.codes.reshape(*scale.shape, -1).astype(np.float32) - np.float32(middle)
        codes *= scale[..., None]
    return codes.reshape(N, K)


MINIMA: Mapping[str, tuple[Callable[..., Bytes], Callable[[Bytes], Minima]]] = MappingProxyType(
    {"Q2_K": (pack_q2_k, unpack_q2_k), "Q4_K": (pack_q4_k, unpack_q4_k), "Q5_K": (pack_q5_k, unpack_q5_k)}
)
CENTRED: Mapping[str, tuple[Callable[..., Bytes], Callable[[Bytes], Centred]]] = MappingProxyType(
    {"Q3_K": (pack_q3_k, unpack_q3_k), "Q6_K": (pack_q6_k, unpack_q6_k)}
)
MIDDLE: Mapping[str, int] = MappingProxyType({"Q3_K": 4, "Q6_K": 32})


def decode(kind: str, raw: Bytes) -> Floats:
    """(N, bytes of a row) uint8 -> (N, K) float32."""
    if kind in CENTRED:
        return decode_centred(CENTRED[kind][1](raw), MIDDLE[kind])
    return decode_minima(MINIMA[kind][1](raw))


def _minima(rows: int, codes: Codes, d: Bytes, dmin: Bytes, sc: Codes, m: Codes) -> Minima:
    numbers = (np.ascontiguousarray(part).reshape(rows, -1) for part in (sc, m))
    return Minima(codes.reshape(rows, -1), _halves(rows, d), _halves(rows, dmin), *numbers)


def _check(codes: Codes, largest: int) -> None:
    if codes.shape[1] % WEIGHTS:
        raise FormatError(f"a row has {codes.shape[1]} weights, K-quants need a multiple of {WEIGHTS}")
    if codes.size and int(codes.max()) > largest:
        raise FormatError(f"a code is {int(codes.max())}, this type holds 0 to {largest}")


def _bytes(values: Halves) -> Bytes:
    """(N, S) fp16 -> (B, 2)."""
    return np.ascontiguousarray(values, dtype=np.float16).reshape(-1, 1).view(np.uint8)


def _halves(rows: int, pairs: Bytes) -> Halves:
    return np.ascontiguousarray(pairs).view(np.float16).reshape(rows, -1)


def _pack_nibbles(codes: Codes, run: int) -> Bytes:
    """Codes below 16 -> (B, 128): each run of `run` weights in the low halves, the next run in the high halves."""
    runs = codes.reshape(-1, WEIGHTS // (2 * run), 2, run)
    packed: Bytes = runs[:, :, 0] | (runs[:, :, 1] << 4)
    return packed.reshape(-1, WEIGHTS // 2)


def _unpack_nibbles(stored: Bytes, run: int) -> Codes:
    runs = stored.reshape(-1, WEIGHTS // (2 * run), run)
    return np.stack([runs & 15, runs >> 4], axis=2).reshape(-1, WEIGHTS)


def _pack_pairs(codes: Codes) -> Bytes:
    """Codes below 4 -> (B, 64)."""
    return _joined_pairs(codes.reshape(-1, 2, 4, 32)).reshape(-1, 64)  # half of the block, quarter of it, byte


def _unpack_pairs(stored: Bytes) -> Codes:
    return _split_pairs(stored.reshape(-1, 2, 32)).reshape(-1, WEIGHTS)


def _joined_pairs(pairs: Codes) -> Bytes:
    """(…, 4, n) below 4 -> (…, n): four of them in a byte, the first in the low bits."""
    joined: Bytes = pairs[..., 0, :] | (pairs[..., 1, :] << 2) | (pairs[..., 2, :] << 4) | (pairs[..., 3, :] << 6)
    return joined


def _split_pairs(stored: Bytes) -> Codes:
    """The inverse of `_joined_pairs`."""
    pairs: Codes = (stored[..., None, :] >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    return pairs


def _require_bits(*numbers: NDArray[Any], bits: int) -> None:
    """Raise FormatError for the scale or the minimum of a sub-block that has more bits."""
    for values in numbers:
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits:
            raise FormatError(f"the scale or the minimum of a sub-block does not fit into {bits} bits")


def _pack_six(sc: Codes, m: Codes) -> Bytes:
    """(N, K/32) twice, 0..63 -> (B, 12)."""
    _require_bits(sc, m, bits=6)
    s, t = sc.astype(np.uint8).reshape(-1, 8), m.astype(np.uint8).reshape(-1, 8)
    low = (s[:, 4:] & 15) | ((t[:, 4:] & 15) << 4)
    return np.concatenate([s[:, :4] | ((s[:, 4:] >> 4) << 6), t[:, :4] | ((t[:, 4:] >> 4) << 6), low], axis=1)


def _six(blocks: Bytes) -> tuple[Codes, Codes]:
    """sc and m of blocks of Q4_K or Q5_K, (B, 8) each."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc = np.concatenate([first & 63, (low & 15) | ((first >> 6) << 4)], axis=1)
    m = np.concatenate([second & 63, (low >> 4) | ((second >> 6) << 4)], axis=1)
    return sc, m
