"""The product in plain torch, for a tensor on any device: a few rows of W at a time, so that W is never all there.

Three things make it quick.

* **A field is shifted to the top of its int16 and back down.**  The shift down is arithmetic, so it copies the sign
  bit; with the highest bit of each field flipped beforehand, what arrives is code - 2**(bits - 1), the middle already
  subtracted.  That leaves four passes over the weights, all of them vectorised: up, down, to float32, times scale.
  Zeros are a fifth.
* **x is reordered, not W.**  Shifting whole rows of words gives the columns of field 0 of every tile, then those of
  field 1, and so on (*field order* below): long contiguous runs, about three times faster to write than the natural
  order.  A product does not care about the order of its columns as long as x has the same.
* **The piece of W stays in cache** between its passes and the product.

Every weight is the definition's scale * (code - zero), the difference exact and the product rounded once to float32;
the sum is float32's.

Measured against torch's float32 linear on the weight dequantised beforehand, 1024 x 1024 in 4 bits, g128, one thread of
an AVX2 processor, medians of interleaved calls in one run: 4.1 times its time at M = 1, 1.5 times at M = 64.  Small
weights pay for some 25 calls of torch instead: 256 x 256 takes ten times as long at M = 1, three times at M = 64.

Not here: the gradients of anything but x.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.w4a16.layout import TILE

# 2 MB of float32.  Half of that costs a fifth more time, in dispatch; twice as much costs a tenth less, but then the C
# allocator now and then returns the buffers to the system, and the next call pays to fault them in.
WEIGHTS_AT_ONCE = 1 << 19
WEIGHTS_AT_ONCE_ELSEWHERE = 1 << 26  # on a GPU, launches cost more than memory: 256 MB


@dataclass(frozen=True)
class Fields:
    """How one width lies in words: `count` fields a word, and the int16 in which each field's highest bit is set."""

    count: int
    highest_bits: int


# 3 bits are spread out to fields of four, the code in the upper three (see _nibbles_of_three).
FIELDS = {
    2: Fields(8, 0xAAAA - 0x10000),
    3: Fields(4, 0x8888 - 0x10000),
    4: Fields(4, 0x8888 - 0x10000),
    8: Fields(2, 0x8080 - 0x10000),
}


def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    column_order: Tensor | None,
    *,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """`reference.linear` with float32 sums: x (..., K) -> (..., N) in x's dtype.  `op.check` has seen the arguments."""
    lead, N = x.shape[:-1], words.shape[0]
    rows = x.reshape(-1, in_features)  # (M, K)
    if rows.shape[0] == 0:
        return x.new_empty(*lead, N)
    if column_order is not None:
        rows = rows.index_select(1, column_order)
    X = _to_field_order(rows.to(torch.float32), FIELDS[bits].count)  # (M, Kp)
    product = torch.empty(X.shape[0], N, dtype=torch.float32, device=x.device)
    for n, W in _pieces(words, scales, zeros, bits, in_features, columns_per_group):  # (R, Kp)
        torch.mm(X, W.t(), out=product[:, n])
    if bias is not None:
        product += bias
    return product.to(x.dtype).view(*lead, N)


def input_gradient(
    gradient: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    column_order: Tensor | None,
    *,
    bits: int,
    in_features: int,
    columns_per_group: int,
) -> Tensor:
    """The gradient with respect to x, gradient (..., N) times W -> (..., K) in the dtype of `gradient`."""
    lead, N = gradient.shape[:-1], words.shape[0]
    Y = gradient.reshape(-1, N).to(torch.float32)  # (M, N)
    count, M = FIELDS[bits].count, Y.shape[0]
    if M == 0:
        return gradient.new_empty(*lead, in_features)
    total = torch.zeros(M, _padded(in_features), dtype=torch.float32, device=Y.device)  # field order
    for n, W in _pieces(words, scales, zeros, bits, in_features, columns_per_group):  # (R, Kp)
        total.addmm_(Y[:, n], W)
    packed = total.view(M, count, -1, TILE // count).transpose(1, 2).reshape(M, -1)[:, :in_features]
    if column_order is not None:
        packed = torch.zeros_like(packed).index_add_(1, column_order, packed)
    return packed.to(gradient.dtype).reshape(*lead, in_features)


def _pieces(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, in_features: int, columns_per_group: int
) -> Iterator[tuple[slice, Tensor]]:
    """W by pieces: which R rows, and those as (R, Kp) float32 in field order, in a buffer that the next overwrites."""
    N, Kp = words.shape[0], _padded(in_features)
    count, width = FIELDS[bits].count, 16 // FIELDS[bits].count
    at_once = WEIGHTS_AT_ONCE if words.device.type == "cpu" else WEIGHTS_AT_ONCE_ELSEWHERE
    rows = max(1, min(at_once // Kp, N))
    groups = _group_of_blocks(scales.shape[0], Kp, count, columns_per_group, words.device)
    ups = torch.arange(16 - width, -1, -width, dtype=torch.int16, device=words.device).unsqueeze(1)  # (F, 1)
    integers = torch.empty(rows, count, Kp // count, dtype=torch.int16, device=words.device)
    floats = torch.empty(rows, Kp, dtype=torch.float32, device=words.device)
    for start in range(0, N, rows):
        n = slice(start, min(start + rows, N))
        R = n.stop - n.start
        fields = words[n] if bits != 3 else _nibbles_of_three(words[n])
        flipped = (fields ^ FIELDS[bits].highest_bits).unsqueeze(1)  # (R, 1, Kp / F)
        centred = torch.bitwise_left_shift(flipped, ups, out=integers[:R]).bitwise_right_shift_(16 - bits)
        scale = _by_block(scales[:, n], groups, count)  # (R, B, 1)
        W = floats[:R].view(R, scale.shape[1], -1).copy_(centred.view(R, scale.shape[1], -1))
        if zeros is not None:
            W -= _by_block(zeros[:, n], groups, count) - (1 << (bits - 1))
        W *= scale
        yield n, W.view(R, Kp)


def _group_of_blocks(G: int, Kp: int, count: int, columns_per_group: int, device: torch.device) -> Tensor | None:
    """(B,) int64: the group of each block, a block being the longest run that no group boundary cuts in field order.

    None where groups are whole tiles, or there is only one: then every field has one block for each group.
    """
    if G == 1 or (columns_per_group % TILE == 0 and G * columns_per_group == Kp):
        return None
    run = math.gcd(columns_per_group, TILE // count)
    group = torch.arange(0, Kp, run, device=device).div_(columns_per_group, rounding_mode="floor")
    if Kp > G * columns_per_group:
        group.clamp_(max=G - 1)  # blocks of nothing but padding
    return group.view(-1, count, TILE // count // run).transpose(0, 1).reshape(-1)  # (T, F, ...) -> (F, T, ...)


def _by_block(values: Tensor, groups: Tensor | None, count: int) -> Tensor:
    """Values of groups (G, R) -> values of blocks (R, B, 1) float32."""
    by_row = values.t().repeat(1, count) if groups is None else values.index_select(0, groups).t()
    return by_row.to(torch.float32).unsqueeze(2)


def _nibbles_of_three(words: Tensor) -> Tensor:
    """(R, T * 24) int16 of 3-bit codes -> (R, T * 32) int16, the 4-bit layout with each code in the upper three bits.

    The planes nest: of nibble words 0 .. 15 and 16 .. 31 the low bits are the 2-bit plane shifted down by 0 and by 2,
    every second field; of nibble words 8 i .. 8 i + 7 the highest bit is the 1-bit plane shifted by i, every fourth.
    """
    shifted = [words.view(words.shape[0], -1, 24) >> i for i in range(4)]  # (R, T, 24) each: whole rows are quicker
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
