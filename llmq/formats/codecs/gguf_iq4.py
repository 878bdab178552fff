"""Blocks of GGUF whose codes (quantized values) stand for the values of `IQ4`, which are denser around zero.

    IQ4_NL   18 bytes  32 weights: fp16 d, 16 bytes of nibbles                          w = d * value
    IQ4_XS  136       256 weights: fp16 d, 2 bytes and 4 bytes: sc of 8 sub-blocks of
                      32, 128 bytes of nibbles                                          w = (d * sc[i]) * value

sc + 32 has 6 bits: the low four are the halves of the 4 bytes, in order, and the others are pairs of bits of a
little-endian number, the first in its low bits.  In each run of 32 weights, byte j of the nibbles holds weight j in its
low half and weight j + 16 in its high half.

Source: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h (the table and the layout).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError
from llmq.formats.codecs.gguf_rows import split_blocks
from llmq_kernels.value_tables import IQ4

Bytes = NDArray[Any]  # uint8
Codes = NDArray[Any]  # uint8
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]

SIZES: Mapping[str, tuple[int, int]] = MappingProxyType({"IQ4_NL": (32, 18), "IQ4_XS": (256, 136)})
RUN, LARGEST, MIDDLE = 32, 15, 32
VALUES = np.array(IQ4.numbers, dtype=np.float32)


@dataclass(frozen=True)
class Valued:
    """A weight in one of these types: w = (d * sc) * value of its code.

    codes (N, K) uint8; d (N, S) float16, S = K/256 or, in IQ4_NL, K/32; sc (N, K/32) int8, in IQ4_NL all 1
    """

    codes: Codes
    d: Halves
    sc: NDArray[np.int8]


def pack_iq4_nl(codes: Codes, d: Halves, sc: NDArray[np.int8]) -> Bytes:
    """(N, K) codes 0..15, (N, K/32) d, and sc, which must be 1 -> (N, K/32 * 18) uint8."""
    if (sc != 1).any():
        raise FormatError("IQ4_NL has no scales of sub-blocks, expected 1 for each")
    return np.concatenate((_bytes(d), _nibbles(codes, "IQ4_NL")), axis=1).reshape(len(codes), -1)


def pack_iq4_xs(codes: Codes, d: Halves, sc: NDArray[np.int8]) -> Bytes:
    """(N, K) codes 0..15, (N, K/256) d, (N, K/32) sc -32..31 -> (N, K/256 * 136) uint8."""
    stored = sc.astype(np.int16).reshape(-1, 8) + MIDDLE
    if stored.size and not 0 <= int(stored.min()) <= int(stored.max()) < 2 * MIDDLE:
        raise FormatError("the scale of a sub-block does not fit into 6 bits")
    numbers = stored.astype(np.uint16)
    high = np.bitwise_or.reduce((numbers >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    low = (numbers[:, ::2] & 15) | ((numbers[:, 1::2] & 15) << 4)
    parts = (_bytes(d), high.astype("<u2")[:, None].view(np.uint8), low.astype(np.uint8), _nibbles(codes, "IQ4_XS"))
    return np.concatenate(parts, axis=1).reshape(len(codes), -1)


def unpack_iq4_nl(raw: Bytes) -> Valued:
    """The inverse of `pack_iq4_nl`."""
    blocks, N = split_blocks("IQ4_NL", SIZES["IQ4_NL"][1], raw), len(raw)
    d = _halves(blocks[:, :2], N)
    return Valued(_codes(blocks[:, 2:], N), d, np.ones(d.shape, dtype=np.int8))


def unpack_iq4_xs(raw: Bytes) -> Valued:
    """The inverse of `pack_iq4_xs`."""
    blocks, N = split_blocks("IQ4_XS", SIZES["IQ4_XS"][1], raw), len(raw)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)  # (B, 8)
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    sc = (low | ((high & 3) << 4)).astype(np.int16) - MIDDLE
    return Valued(_codes(blocks[:, 8:], N), _halves(blocks[:, :2], N), sc.astype(np.int8).reshape(N, -1))


def decode(kind: str, raw: Bytes) -> Floats:
    """(N, bytes of a row) uint8 -> (N, K) float32."""
    w = TYPES[kind][1](raw)
    N, K = w.codes.shape
    with np.errstate(invalid="ignore"):  # a file may hold NaN, which is passed on
        scale = w.d.astype(np.float32)[:, :, None] * w.sc.reshape(*w.d.shape, -1).astype(np.float32)  # (N, S, runs)
        values = VALUES[w.codes].reshape(*scale.shape, RUN)
        values *= scale[..., None]
    return values.reshape(N, K)


TYPES = MappingProxyType({"IQ4_NL": (pack_iq4_nl, unpack_iq4_nl), "IQ4_XS": (pack_iq4_xs, unpack_iq4_xs)})


def _nibbles(codes: Codes, kind: str) -> Bytes:
    """(N, K) codes -> (B, half of the weights of a block)."""
    weights = SIZES[kind][0]
    if codes.shape[1] % weights:
        raise FormatError(f"a row has {codes.shape[1]} weights, {kind} needs a multiple of {weights}")
    if codes.size and int(codes.max()) > LARGEST:
        raise FormatError(f"a code is {int(codes.max())}, this type holds 0 to {LARGEST}")
    halves = codes.reshape(-1, 2, RUN // 2)
    packed: Bytes = halves[:, 0] | (halves[:, 1] << 4)
    return packed.reshape(-1, weights // 2)


def _codes(nibbles: Bytes, rows: int) -> Codes:
    """(B, half of the weights of a block) -> (N, K)."""
    runs = nibbles.reshape(-1, RUN // 2)
    return np.concatenate((runs & 15, runs >> 4), axis=1).reshape(rows, -1)


def _bytes(values: Halves) -> Bytes:
    """(N, S) fp16 -> (B, 2)."""
    return np.ascontiguousarray(values, dtype=np.float16).reshape(-1, 1).view(np.uint8)


def _halves(pairs: Bytes, rows: int) -> Halves:
    return np.ascontiguousarray(pairs).view(np.float16).reshape(rows, -1)
