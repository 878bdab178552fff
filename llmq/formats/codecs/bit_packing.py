"""Codes (quantized values) of 2 to 8 bits as one dense stream of bits in int32 words, lowest bit first.

Code i takes the bits i*b … i*b + b - 1 of the stream, and bit s of the stream is bit s % 32 of word s // 32.

    b = 4    word 0   bit  31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
                      code    7       6       5       4       3      2       1       0

    b = 3    word 0   bit  31..30  29..27  26..24   …    8..6    5..3    2..0       the 2 low bits of code 10,
                      code   10       9       8     …      2       1       0        its third is first in word 1
             word 1   bit    31    30..28  27..25   …    6..4    3..1     0         the low bit of code 21,
                      code   21      20      19     …     12      11     10         its other two begin word 2
             word 2   bit  31..29  28..26  25..23   …   10..8    7..5    4..2   1..0
                      code   31      30      29     …     24      23      22     21

32 codes fill exactly b words.  On a little-endian machine (all that torch's wheels run on) the same stream can be read
as bytes, and 8 codes fill exactly b bytes.  So the code works on units of 8 codes with eight strided operations on
uint8, and no temporary tensor is wider than the codes.

Older versions of compressed-tensors stored 3 bits padded, ten codes per word with two high bits unused:
`unpack_padded`.
"""

import torch
from torch import Tensor

CODES_PER_UNIT = 8
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def words_for(length: int, bits: int) -> int:
    """How many int32 words hold `length` codes."""
    return -(-length * bits // 32)


def padded_words_for(length: int, bits: int) -> int:
    """How many int32 words hold `length` codes where no code may cross words."""
    return -(-length // (32 // bits))


def in_units(rows: Tensor, size: int) -> Tensor:
    """(…, L) -> (…, L / size, size)"""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """uint8 (…, L, …), every code below 2**bits -> int32 (…, words_for(L), …), contiguous, packed along `dim`.

    Bits after the last code are 0.
    """
    rows = codes.movedim(dim, -1)  # (…, L)
    length = rows.shape[-1]
    if length % 32:
        rows = torch.nn.functional.pad(rows, (0, -length % 32))
    units = in_units(rows, CODES_PER_UNIT)  # (…, units, 8)
    stream = torch.zeros((*units.shape[:-1], bits), dtype=torch.uint8, device=codes.device)  # (…, units, b)
    for position in range(CODES_PER_UNIT):
        byte, shift = divmod(position * bits, 8)
        stream[..., byte] |= units[..., position] << shift  # bits above the byte are dropped
        if shift + bits > 8:
            stream[..., byte + 1] |= units[..., position] >> (8 - shift)  # and put into the next byte
    words = stream.flatten(-2).view(torch.int32)[..., : words_for(length, bits)]
    return words.movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, length: int, dim: int = -1) -> Tensor:
    """int32 (…, words_for(length), …) -> uint8 (…, length, …), contiguous: the inverse of `pack`."""
    rows = words.movedim(dim, -1).contiguous()  # (…, words)
    if rows.shape[-1] % bits:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % bits))
    stream = in_units(rows.view(torch.uint8), bits)  # (…, units, b)
    units = torch.empty((*stream.shape[:-1], CODES_PER_UNIT), dtype=torch.uint8, device=words.device)
    for position in range(CODES_PER_UNIT):
        byte, shift = divmod(position * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        units[..., position] = code & ((1 << bits) - 1)
    return units.flatten(-2)[..., :length].movedim(-1, dim).contiguous()


def unpack_planes(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 (…, words) -> uint8 (…, length), where the low and the high bits of 32 codes are in separate words.

    The words with the low bits of 32 codes come first, then those with higher bits.  3 bits are planes of 2 and 1, 5
    bits of 4 and 1, 6 bits of 4 and 2, 7 bits of 4, 2 and 1.  2, 4 and 8 bits are one plane, which is the plain stream.
    """
    rows = in_units(words.contiguous(), bits)  # (…, units, b): 32 codes each
    codes = torch.zeros((*rows.shape[:-1], 32), dtype=torch.uint8, device=words.device)
    word = bit = 0
    for width in PLANES[bits]:
        plane = unpack(rows[..., word : word + width].contiguous(), width, 32)  # (…, units, 32)
        codes |= plane << bit
        word, bit = word + width, bit + width
    return codes.flatten(-2)[..., :length].contiguous()


def unpack_padded(words: Tensor, bits: int, length: int, dim: int = -1) -> Tensor:
    """int32 (…, padded_words_for(length), …) -> uint8 (…, length, …): whole codes only, 32 // bits per word."""
    rows = words.movedim(dim, -1)  # (…, words)
    columns = [((rows >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(32 // bits)]
    return torch.stack(columns, dim=-1).flatten(-2)[..., :length].movedim(-1, dim).contiguous()
