"""Codes to words and back in torch, on any device, for loading checkpoints.  `reference.py` draws the layout.

The planes are nested.  Column 64 + i lies eight bits above column i; within a byte, column 32 + i lies four bits above
column i; and so on for each half.  So packing *folds* a tile: its right half is put over its left half, shifted by 8,
then by 4, 2 and 1, until 8 b words are left for a plane of b bits.  Unpacking unfolds.  All but the first fold stay
within bytes, so temporaries are uint8, and rows are processed in pieces: the memory used besides codes and words does
not grow with the weight.  Pieces are small on a CPU, where they stay in cache, and large on a GPU, where launches cost
more than memory.  A weight is checked once, after all pieces are queued, because reading a value waits for the GPU.
"""

from functools import reduce

import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError

TILE = 128

# bits: the planes of a tile in their order, each as (lowest bit of the code that it holds, bits per column)
PLANES = {
    2: ((0, 2),),
    3: ((0, 2), (2, 1)),
    4: ((0, 4),),
    5: ((0, 4), (4, 1)),
    6: ((0, 4), (4, 2)),
    7: ((0, 4), (4, 2), (6, 1)),
    8: ((0, 8),),
}

LOW_FIELDS = {1: 0x55, 2: 0x33, 4: 0x0F}  # the lower of each two fields of this many bits in a byte

CODES_AT_ONCE = 1 << 20  # a few temporaries of 1 MB
CODES_AT_ONCE_ELSEWHERE = 1 << 26  # on a GPU: a few of 64 MB


def words_per_row(in_features: int, bits: int) -> int:
    """Words of one packed row, Kp / 16 * bits.  Raises KernelInputError for a width without a layout."""
    if bits not in PLANES:
        raise KernelInputError(f"bits is {bits!r}, expected one of {', '.join(map(str, PLANES))}")
    return -(-in_features // TILE) * 8 * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 in [0, 2**bits - 1] -> words (N, Kp / 16 * bits) int16 on the same device.

    Raises KernelInputError for a width without a layout, another dtype or rank, or a code that does not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise KernelInputError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected torch.uint8 (N, K)")
    N, K = codes.shape
    T, rows = -(-K // TILE), _rows_at_once(K, codes.device)
    words = torch.empty(N, words_per_row(K, bits), dtype=torch.int16, device=codes.device)
    largest = [codes.new_zeros(())]  # per piece; on the device
    for piece, packed in zip(torch.split(codes, rows), torch.split(words, rows), strict=True):  # R rows
        if piece.numel():
            largest.append(piece.max())
        tiles = torch.nn.functional.pad(piece, (0, -K % TILE)).view(-1, T, TILE)  # (R, T, 128)
        planes = [_fold(tiles >> low & (1 << width) - 1, width) for low, width in PLANES[bits]]
        packed.copy_(torch.cat(planes, dim=2).flatten(1))
    _refuse_large(int(torch.stack(largest).max()), bits)
    return words


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Words (N, Kp / 16 * bits) int16 -> codes (N, K) uint8 on the same device: the inverse of `pack`.

    Raises KernelInputError for a width without a layout, or words of another shape or dtype.
    """
    width_of_row = words_per_row(in_features, bits)
    if words.dtype != torch.int16 or words.dim() != 2 or words.shape[1] != width_of_row:
        raise KernelInputError(
            f"words are {words.dtype} {tuple(words.shape)}, "
            f"expected torch.int16 (N, {width_of_row}) for {in_features} columns of {bits} bits"
        )
    T, rows = -(-in_features // TILE), _rows_at_once(in_features, words.device)
    codes = torch.empty(words.shape[0], in_features, dtype=torch.uint8, device=words.device)
    for packed, piece in zip(torch.split(words, rows), torch.split(codes, rows), strict=True):
        tiles = packed.reshape(-1, T, 8 * bits)
        planes = torch.split(tiles, [8 * width for _, width in PLANES[bits]], dim=2)
        fields = (_unfold(plane, width) << low for plane, (low, width) in zip(planes, PLANES[bits], strict=True))
        piece.copy_(reduce(torch.bitwise_or, fields).flatten(1)[:, :in_features])
    return codes


def _fold(values: Tensor, width: int) -> Tensor:
    """(R, T, 128) uint8 of `width` bits -> (R, T, 8 * width) int16."""
    halves = torch.unflatten(values, 2, (2, TILE // 2))  # (R, T, 2, 64): columns of the low byte, of the high byte
    shift = 4
    while halves.shape[3] > 8 * width:
        left, right = halves.chunk(2, dim=3)
        halves = left | right << shift
        shift //= 2
    low, high = halves.to(torch.int16).unbind(2)
    return low | high << 8


def _unfold(words: Tensor, width: int) -> Tensor:
    """(R, T, 8 * width) int16 -> (R, T, 128) uint8 of `width` bits."""
    halves = torch.stack([words & 0xFF, words >> 8 & 0xFF], dim=2).to(torch.uint8)  # (R, T, 2, 8 * width)
    shift = width
    while halves.shape[3] < TILE // 2:
        halves = torch.cat([halves & LOW_FIELDS[shift], halves >> shift & LOW_FIELDS[shift]], dim=3)
        shift *= 2
    return halves.flatten(2)


def _refuse_large(largest: int, bits: int) -> None:
    """A code that is too large has changed the bits of its neighbours."""
    if largest >= 1 << bits:
        raise KernelInputError(f"a code is {largest}, expected at most {(1 << bits) - 1} for {bits} bits")


def _rows_at_once(in_features: int, device: torch.device) -> int:
    codes = CODES_AT_ONCE if device.type == "cpu" else CODES_AT_ONCE_ELSEWHERE
    return max(1, codes // max(1, in_features))
