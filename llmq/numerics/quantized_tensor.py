"""`QuantizedTensor`: a quantized weight, as algorithms, formats and kernels pass it on.

*Codes* are its quantized values, unsigned integers; *zeros* are its zero points.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import value_table

SMALLEST_SHARED = 2.0**-24  # in float16; llama.cpp reads subnormal numbers, and d and dmin often are subnormal


@dataclass(frozen=True)
class Superblocks:
    """A two-level grid: group g of superblock b has the scale d_b * sc_g and, asymmetric, the offset dmin_b * m_g.

    d     (N, S) float16     S = K / 256 superblocks per row; in Q4_1 and IQ4_NL S = G = K / 32, and all sc and m are 1
    sc    (N, G) uint8 of 6 bits, or int8 in a symmetric grid
    dmin  (N, S) float16, or None in a symmetric grid
    m     (N, G) uint8 of 6 bits, or None in a symmetric grid

    w = (d * sc) * q - dmin * m, or (d * sc) * (q - middle), in float32 and in this order, as llama.cpp computes it.  In
    IQ4_NL and IQ4_XS a value of a table takes the place of q - middle.  No value is 0 there, so groups of zeros have
    the scale 0 (`with_zeros`), which tuning does not change.
    """

    d: Tensor
    sc: Tensor
    dmin: Tensor | None = None
    m: Tensor | None = None

    def scales(self) -> Tensor:
        """(N, G) float32."""
        return _spread(self.d, self.sc) * self.sc

    def offsets(self) -> Tensor | None:
        """(N, G) float32."""
        return None if self.dmin is None or self.m is None else _spread(self.dmin, self.m) * self.m

    def shared(self) -> Tensor:
        """(N, S) or (N, 2 S) float32: the real numbers of the grid, d and then dmin."""
        return torch.cat([part.to(torch.float32) for part in (self.d, self.dmin) if part is not None], dim=1)

    def with_shared(self, values: Tensor) -> "Superblocks":
        """The same grid with new `shared` values, rounded to float16; 0 stays 0, others keep their sign."""
        before, largest = self.shared(), torch.finfo(torch.float16).max
        negative = before < 0
        sizes = torch.where(negative, -values, values).clamp(SMALLEST_SHARED, largest)
        halves = torch.where(negative, -sizes, sizes).masked_fill_(before == 0, 0.0).to(torch.float16)
        d, *dmin = halves.split(self.d.shape[1], dim=1)
        return Superblocks(d, self.sc, dmin[0] if dmin else None, self.m)

    def stretched(self, factors: Tensor) -> "Superblocks":
        """The same grid with `shared` times `factors`."""
        return self.with_shared(self.shared() * factors)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Superblocks":
        """The same grid with `change` applied to each of its tensors."""
        dmin, m = (None if part is None else change(part) for part in (self.dmin, self.m))
        return Superblocks(change(self.d), change(self.sc), dmin, m)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight on its grid: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g the group of column k.

    codes        (N, K) uint8, in [0, 2**bits - 1]
    scales       (N, G) in the dtype of the file; any finite value, also negative
    zeros        (N, G) int16, or None where every zero point is 2**(bits - 1)
    group_index  (K,) int32 group of each column, or None where it is k // columns_per_group
    scheme       bits, group size, symmetry
    superblocks  in a two-level grid: its integers and real numbers, from which scales and zeros are computed.  Both are
                 float32 there, and zeros are not integers
    global_scale (N, 1) float32, the same in every row: what the E4M3 numbers of an nvfp4 grid are divided by

    With a value table (`value_table.py`) w = scales * value of the code; scales of nvfp4 and mxfp4 are float32.

    N out_features, K in_features, G groups.  "channel" has G = 1.  "tensor" has G = 1 too, its one scale repeated N
    times.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: WeightScheme
    group_index: Tensor | None = None
    superblocks: Superblocks | None = None
    global_scale: Tensor | None = None

    @classmethod
    def blank(cls, rows: int, columns: int, scheme: WeightScheme, scale_dtype: torch.dtype) -> "QuantizedTensor":
        """A weight of zeros, to learn its packed size; not for two-level grids."""
        groups = columns // scheme.columns_per_group(columns)
        table = value_table(scheme)
        zero = 0 if table is None else table.zero
        codes = torch.full((rows, columns), zero, dtype=torch.uint8)
        zeros = None if scheme.symmetric else torch.full((rows, groups), scheme.middle, dtype=torch.int16)
        scales = torch.ones(rows, groups, dtype=torch.float32 if scheme.few_scales else scale_dtype)
        return cls(codes, scales, zeros, scheme, global_scale=scales[:, :1] if scheme.floats == "nvfp4" else None)

    @classmethod
    def of_superblocks(cls, codes: Tensor, superblocks: Superblocks, scheme: WeightScheme) -> "QuantizedTensor":
        """A weight on a two-level grid."""
        return cls(codes, *affine(superblocks), scheme, superblocks=superblocks)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def shared(self) -> Tensor | float:
        """`global_scale`, or 1."""
        return 1.0 if self.global_scale is None else self.global_scale

    def column_groups(self) -> Tensor:
        """(K,) int64: the group of each column."""
        if self.group_index is not None:
            return self.group_index.long()
        per_group = self.scheme.columns_per_group(self.codes.shape[1])
        return torch.arange(self.codes.shape[1], device=self.codes.device) // per_group

    def dequantize(self) -> Tensor:
        """(N, K) float32, computed in float32 from the stored scales, as every reader of the file does."""
        table = value_table(self.scheme)
        weight = self.codes.to(torch.float32) if table is None else table.values(self.codes)  # (N, K)
        values, spread = weight, self._spread
        if self.group_index is None:  # a view by group, so that no (N, K) of scales is made
            values, spread = weight.unflatten(1, (self.scales.shape[1], -1)), _last_axis
        offsets = None if self.superblocks is None else self.superblocks.offsets()
        if offsets is not None:
            values.mul_(spread(self.scales)).sub_(spread(offsets))
            return weight
        if table is None:
            values -= self.scheme.middle if self.zeros is None else spread(self.zeros.to(torch.float32))
        values *= spread(self.scales.to(torch.float32))
        return weight

    def _spread(self, by_group: Tensor) -> Tensor:
        """(N, G) -> (N, K): the entry of the group of each column."""
        return by_group[:, self.column_groups()]

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Rows `start` to `stop` (out_features), in the same memory."""
        return self._mapped(lambda part: part[start:stop], self.group_index)

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same weight on another device."""
        index = None if self.group_index is None else self.group_index.to(device)
        return self._mapped(lambda part: part.to(device), index)

    def _mapped(self, change: Callable[[Tensor], Tensor], group_index: Tensor | None) -> "QuantizedTensor":
        """The same weight with `change` applied to each tensor that has one row per out_feature."""
        zeros = None if self.zeros is None else change(self.zeros)
        superblocks = None if self.superblocks is None else self.superblocks.mapped(change)
        shared = None if self.global_scale is None else change(self.global_scale)
        codes, scales = change(self.codes), change(self.scales)
        return QuantizedTensor(codes, scales, zeros, self.scheme, group_index, superblocks, shared)


def with_zeros(quantized: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """`quantized`, where groups that are zeros in `weight` (N, K) are zeros, too; only IQ4_NL and IQ4_XS need this."""
    table, blocks = value_table(quantized.scheme), quantized.superblocks
    if table is None or blocks is None:
        return quantized
    empty = ~weight.unflatten(1, (blocks.sc.shape[1], -1)).any(-1)  # (N, G)
    if not empty.any():
        return quantized
    codes = quantized.codes.masked_fill(empty[:, quantized.column_groups()], table.zero)
    one_group = blocks.d.shape == blocks.sc.shape
    d, sc = (blocks.d.masked_fill(empty, 0), blocks.sc) if one_group else (blocks.d, blocks.sc.masked_fill(empty, 0))
    return QuantizedTensor.of_superblocks(codes, Superblocks(d, sc), quantized.scheme)


def affine(superblocks: Superblocks) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points (N, G) float32 of a two-level grid; no zero points (None) where it is symmetric."""
    scales, offsets = superblocks.scales(), superblocks.offsets()
    return scales, None if offsets is None else offsets / scales


def stacked(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One weight with the rows of all parts, which have the same scheme and columns."""
    first, grids = parts[0], [part.superblocks for part in parts if part.superblocks is not None]
    superblocks = None
    if grids:
        d, sc = torch.cat([grid.d for grid in grids]), torch.cat([grid.sc for grid in grids])
        superblocks = Superblocks(d, sc, _joined(grid.dmin for grid in grids), _joined(grid.m for grid in grids))
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    zeros = _joined(part.zeros for part in parts)
    shared = _joined(part.global_scale for part in parts)
    return QuantizedTensor(codes, scales, zeros, first.scheme, first.group_index, superblocks, shared)


def _joined(tensors: Iterable[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def where(keep: Tensor, one: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
    """Rows of `one` where `keep` (N, 1) bool is true, else of `other`; both have the same scheme."""
    codes = torch.where(keep, one.codes, other.codes)
    if one.superblocks is None or other.superblocks is None:
        zeros = None if one.zeros is None or other.zeros is None else torch.where(keep, one.zeros, other.zeros)
        return dataclasses.replace(one, codes=codes, scales=torch.where(keep, one.scales, other.scales), zeros=zeros)
    a, b = one.superblocks, other.superblocks
    dmin = None if a.dmin is None or b.dmin is None else torch.where(keep, a.dmin, b.dmin)
    m = None if a.m is None or b.m is None else torch.where(keep, a.m, b.m)
    chosen = Superblocks(torch.where(keep, a.d, b.d), torch.where(keep, a.sc, b.sc), dmin, m)
    return QuantizedTensor.of_superblocks(codes, chosen, one.scheme)


def _last_axis(by_group: Tensor) -> Tensor:
    """(N, G) -> (N, G, 1)."""
    return by_group[..., None]


def _spread(shared: Tensor, groups: Tensor) -> Tensor:
    """(N, S) -> (N, G) float32: the value of a superblock, repeated for each of its groups."""
    return shared.to(torch.float32).repeat_interleave(groups.shape[1] // shared.shape[1], dim=1)
