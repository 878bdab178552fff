"""The product in plain torch, on any device: a few rows of W are dequantized at a time, never all of W.

Three things make it fast.

* **A field is masked, never shifted.**  Field j of a word, masked in place, is its code times 2**(w j), with w bits per
  field.  Subtracting the middle code times 2**(w j), in int16 arithmetic that wraps around, gives exactly
  2**(w j) (code - middle), for the topmost field too, whose highest bit is the sign.  The scale is divided by the power
  of two, which is exact.  That leaves four passes over the weights, all of them vectorized: mask, subtract, convert to
  float32, multiply by the scale.  Zero points add a fifth.
* **x is reordered, not W.**  Masking whole rows of words gives the columns of field 0 of every tile, then those of
  field 1, and so on (*field order* below): long contiguous runs, about three times faster to write than the natural
  order.  The product is the same for any order of columns, as long as x has the same order.
* **The piece of W stays in cache** between its passes and the product.

Every weight is scale * (code - zero point), as in the definition: the difference is exact, the product is rounded once
to float32, and sums are in float32.  `kernels/bench/cpu.py` measures it.  Small batches use `small_batches.py` where
that is faster.

Only x gets a gradient.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.w4a16.layout import PLANES, TILE
from llmq_kernels.w4a16.packed_weight import PackedWeight

# 4 MB of float32.  Half of it takes 10 % longer, for more dispatches; twice as much does too, for cache misses.
WEIGHTS_AT_ONCE = 1 << 20
WEIGHTS_AT_ONCE_ELSEWHERE = 1 << 26  # on a GPU launches cost more than memory: 256 MB


@dataclass(frozen=True)
class Fields:
    """How codes of one width lie in int16 words: `count` fields per word, each holding the code times `unit`."""

    count: int
    unit: int = 1

    @property
    def width(self) -> int:
        return 16 // self.count

    def ones(self, device: torch.device) -> Tensor:
        """(F, 1) int32: what a code of 1 in each field adds to a word.  Made on the device: copies synchronize."""
        shifts = torch.arange(0, 16, self.width, dtype=torch.int32, device=device)
        return torch.bitwise_left_shift(self.unit, shifts).unsqueeze(1)


# 3 bits are spread out to fields of four, the code in the upper three (see _nibbles_of_three), 5 to 7 bits to bytes.
FIELDS = {2: Fields(8), 3: Fields(4, unit=2), 4: Fields(4), **{bits: Fields(2) for bits in (5, 6, 7, 8)}}


def linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.linear` with float32 sums: x (..., K) -> (..., N) in x's dtype.  `op.check` accepted the arguments."""
    lead, N = x.shape[:-1], weight.words.shape[0]
    rows = x.reshape(-1, weight.in_features)  # (M, K)
    if rows.shape[0] == 0:
        return x.new_empty(*lead, N)
    if weight.column_order is not None:
        rows = rows.index_select(1, weight.column_order)
    X = _to_field_order(rows.to(torch.float32), FIELDS[weight.bits].count)  # (M, Kp)
    output = torch.empty(*lead, N, dtype=x.dtype, device=x.device)  # not a view: autograd lets users write into it
    product = output.view(rows.shape[0], N)
    if x.dtype != torch.float32:
        product = torch.empty_like(product, dtype=torch.float32)  # (M, N)
    for n, W in _pieces(weight):  # (R, Kp)
        torch.mm(X, W.t(), out=product[:, n])
    if bias is not None:
        product += bias
    if x.dtype != torch.float32:
        output.view(rows.shape[0], N).copy_(product)
    return output


def input_gradient(gradient: Tensor, weight: PackedWeight[Tensor]) -> Tensor:
    """The gradient with respect to x: gradient (..., N) times W -> (..., K) in the dtype of `gradient`."""
    lead, N, in_features = gradient.shape[:-1], weight.words.shape[0], weight.in_features
    Y = gradient.reshape(-1, N).to(torch.float32)  # (M, N)
    count, M = FIELDS[weight.bits].count, Y.shape[0]
    if M == 0:
        return gradient.new_empty(*lead, in_features)
    total = torch.zeros(M, _padded(in_features), dtype=torch.float32, device=Y.device)  # field order
    for n, W in _pieces(weight):  # (R, Kp)
        total.addmm_(Y[:, n], W)
    packed = total.view(M, count, -1, TILE // count).transpose(1, 2).reshape(M, -1)[:, :in_features]
    if weight.column_order is not None:
        packed = torch.zeros_like(packed).index_add_(1, weight.column_order, packed)
    return packed.to(gradient.dtype).reshape(*lead, in_features).contiguous()  # of a partial tile it is a view


def _pieces(weight: PackedWeight[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """W in pieces: which R rows, and these as (R, Kp) float32 in field order, in a buffer that the next overwrites."""
    words, scales, zeros, bits, in_features, columns_per_group, *_ = weight
    N, Kp, layout = words.shape[0], _padded(in_features), FIELDS[bits]
    at_once = WEIGHTS_AT_ONCE if words.device.type == "cpu" else WEIGHTS_AT_ONCE_ELSEWHERE
    rows = max(1, min(at_once // Kp, N))
    middle = 1 << (bits - 1)
    ones = layout.ones(words.device)  # (F, 1)
    masks, middles = ((ones * code).to(torch.int16) for code in ((1 << bits) - 1, middle))  # the top bit is the sign
    powers = ones.to(torch.float32)  # a masked field is the code times this
    blocks = _blocks(scales.shape[0], Kp, layout.count, columns_per_group, words.device)
    scales_by_row = scales.t().to(torch.float32)  # (N, G)
    shifts_by_row = None if zeros is None else zeros.t().to(torch.float32) - middle
    integers = torch.empty(rows, layout.count, Kp // layout.count, dtype=torch.int16, device=words.device)
    floats = torch.empty(rows, Kp, dtype=torch.float32, device=words.device)
    for start in range(0, N, rows):
        n = slice(start, min(start + rows, N))
        R = n.stop - n.start
        fields = _fields(words[n], bits)
        centred = torch.bitwise_and(fields.unsqueeze(1), masks, out=integers[:R]).sub_(middles)  # (R, F, Kp / F)
        scale = blocks.spread(scales_by_row[n])  # (R, P, 1, B, 1)
        P, B = scale.shape[1], scale.shape[3]
        W = floats[:R].copy_(centred.view(R, Kp)).view(R, P, layout.count // P, B, -1)
        if shifts_by_row is not None:
            W -= blocks.spread(shifts_by_row[n]) * powers.view(P, -1, 1, 1)
        W *= scale / powers.view(P, -1, 1, 1)  # (R, P, F / P, B, 1)
        yield n, floats[:R]


@dataclass(frozen=True)
class Blocks:
    """The longest runs of columns without a group boundary, in field order: B per field, equal in F / P fields.

    `group` (P * B,) int64 is the group of each run; None where the runs are in the order of groups, `parts` per tile.
    """

    parts: int
    group: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """Values of groups (R, G) -> values of blocks (R, P, 1, B, 1)."""
        R = values.shape[0]
        if self.group is None:
            return values.view(R, -1, self.parts).transpose(1, 2)[:, :, None, :, None]
        return values.index_select(1, self.group).view(R, self.parts, 1, self.group.shape[0] // self.parts, 1)


def _blocks(G: int, Kp: int, count: int, columns_per_group: int, device: torch.device) -> Blocks:
    width = TILE // count  # columns of a field within a tile
    if G == 1:
        return Blocks(1, None)
    if G * columns_per_group == Kp:
        if columns_per_group % TILE == 0:
            return Blocks(1, None)
        if TILE % columns_per_group == 0 and columns_per_group % width == 0:
            return Blocks(TILE // columns_per_group, None)
    run = math.gcd(columns_per_group, width)
    group = torch.arange(0, Kp, run, device=device).div_(columns_per_group, rounding_mode="floor")
    group.clamp_(max=G - 1)  # blocks that are only padding
    return Blocks(count, group.view(-1, count, width // run).transpose(0, 1).reshape(-1))  # (T, F, .) -> (F, T, .)


def _fields(words: Tensor, bits: int) -> Tensor:
    """Packed rows of any width as words of `FIELDS[bits]`."""
    if bits == 3:
        return _nibbles_of_three(words)
    return _bytes_of_planes(words, bits) if bits in (5, 6, 7) else words


def _bytes_of_planes(words: Tensor, bits: int) -> Tensor:
    """(R, T * 8 * bits) int16 of 5 to 7 bits -> (R, T * 64) int16, the 8-bit layout.

    The planes nest: byte words 8 w k .. 8 w (k + 1) - 1 are the plane of w bits shifted down by w k, in both bytes.
    """
    tiles = words.view(words.shape[0], -1, 8 * bits)
    bytes_ = torch.zeros(*tiles.shape[:2], 64, dtype=torch.int16, device=words.device)
    planes = torch.split(tiles, [8 * width for _, width in PLANES[bits]], dim=2)
    for plane, (low, width) in zip(planes, PLANES[bits], strict=True):
        parts = torch.cat([plane >> width * k for k in range(8 // width)], dim=2)  # (R, T, 64)
        bytes_ |= (parts & ((1 << width) - 1) * 0x0101) << low
    return bytes_.flatten(1)


def _nibbles_of_three(words: Tensor) -> Tensor:
    """(R, T * 24) int16 of 3-bit codes -> (R, T * 32) int16, the 4-bit layout with each code in the upper three bits.

    The planes nest: of nibble words 0 .. 15 and 16 .. 31 the low bits are the 2-bit plane shifted down by 0 and by 2,
    every second field; of nibble words 8 i .. 8 i + 7 the highest bit is the 1-bit plane shifted by i, every fourth.
    """
    shifted = [words.view(words.shape[0], -1, 24) >> i for i in range(4)]  # (R, T, 24) each: whole rows are faster
    two = torch.cat([shifted[0][..., :16], shifted[2][..., :16]], dim=2) & 0x3333  # (R, T, 32)
    one = torch.cat([tiles[..., 16:] for tiles in shifted], dim=2) & 0x1111  # (R, T, 32)
    return (two << 1 | one << 3).flatten(1)


def _to_field_order(rows: Tensor, count: int) -> Tensor:
    """(M, K) -> (M, Kp): padded with zeros, the columns of field 0 of every tile first."""
    M, K = rows.shape
    if K % TILE:
        rows = torch.nn.functional.pad(rows, (0, -K % TILE))
    return rows.view(M, -1, count, TILE // count).transpose(1, 2).reshape(M, -1)


def _padded(in_features: int) -> int:
    return -(-in_features // TILE) * TILE
