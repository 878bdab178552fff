"""Two-level grids: scales and offsets that are small integers times a number shared by 256 columns.

    w  ≈  (d · sc_i) q  -  dmin · m_i         i one of the 8 sub-blocks of 32 columns; sc, m in 0 … 63;  Q4_K, Q5_K
                                              i one of 16 sub-blocks of 16 columns; sc, m in 0 … 15;     Q2_K
    w  ≈  (d · sc_i) (q - middle)             i one of 16 sub-blocks of 16 columns; sc in -128 … 127;    Q6_K
                                              sc in -32 … 31;                                            Q3_K
    w  ≈  d q - dmin                          one sub-block of 32 columns;                               Q4_1
    w  ≈  (d · sc_i) value(q)                 i one of 8 sub-blocks of 32 columns; sc in -32 … 31;       IQ4_XS
    w  ≈  d value(q)                          one sub-block of 32 columns;                               IQ4_NL

q are the codes (quantized values), and value(q) is one of a table (`value_table.py`).  A sub-block alone has an affine
grid with a real offset.  The task is to find the d, dmin, sc and m of a superblock with the least  Σ_j c_j (ŵ_j -
w_j)².  With fixed codes that error is a quadratic form in scale and offset of each sub-block.  It is determined by a
few sums, so that many pairs of d and dmin can be tried at a cost that does not depend on the number of columns.  With
a fixed grid the nearest codes are the best.  Each step below uses one of the two facts, and no step raises the error:

    1. polish   scale and offset of each sub-block by least squares, from several shrunken ranges
    2. share    the best of several pairs (d, dmin) around (max scale, max offset) / 63, with the best sc and m for each
                (63 in 6 bits; the largest integer of the type)
    3. settle   sc and m some steps up and down, with new codes for each; then d and dmin by least squares; twice

d and dmin are rounded to fp16 before any error is computed with them.  sc = 0 is never chosen: all codes would have the
same value, and neither GPTQ nor tuning could move them.  The offset is -min ≥ 0, as everywhere in llama.cpp.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.quantized_tensor import SMALLEST_SHARED, Superblocks
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import value_table

SHRUNKEN = (0.68, 0.75, 0.82, 0.89, 0.96, 1.03)  # factors for each of the two ends of a range
SHRUNKEN_SYMMETRIC = tuple(0.75 + step / 96 for step in range(32))  # one end only, but finer, as there are 64 levels
POLISHED, SETTLED, NEAR = 3, 2, 3
SHARED_FACTORS = (0.9, 0.95, *(1 + step / 32 for step in range(12)))
ELEMENTS_AT_ONCE = {"cpu": 1 << 18}  # fits into its cache
ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class _Sums:
    """Sums over the columns of each sub-block, (R, B), that determine the error for fixed codes."""

    c: Tensor
    cq: Tensor
    cqq: Tensor
    cx: Tensor
    cqx: Tensor

    @classmethod
    def of(cls, x: Tensor, cost: Tensor, q: Tensor) -> "_Sums":
        cq = cost * q
        return cls(cost.expand_as(x).sum(-1), cq.sum(-1), (cq * q).sum(-1), (cost * x).sum(-1), (cq * x).sum(-1))

    def error(self, s: Tensor, o: Tensor) -> Tensor:
        """Σ c (s q - o - x)², without the terms that do not depend on s and o."""
        return s * (s * self.cqq - 2 * o * self.cq - 2 * self.cqx) + o * (o * self.c + 2 * self.cx)


def fit(weight: Tensor, scheme: WeightScheme, importance: Tensor | None = None) -> Superblocks:
    """The two-level grid of least error for `weight` (N, K) float32, K a multiple of the columns of a block.

    importance  (K,) float32, the c_j above; 1 where not given
    """
    N, K = weight.shape
    costs = torch.ones(K, device=weight.device) if importance is None else importance.to(torch.float32)
    costs = costs / costs.mean().clamp_min(torch.finfo(torch.float32).tiny)
    assert scheme.block_type is not None, "only block types have two levels"
    blocks = K // BLOCK_TYPES[scheme.block_type].columns
    cost = costs.reshape(blocks, -1, scheme.columns_per_group(K))  # (S, B, g)
    pieces = []
    for rows in weight.split(max(1, ELEMENTS_AT_ONCE.get(weight.device.type, ELEMENTS_AT_ONCE_ELSEWHERE) // K)):
        x = rows.reshape(len(rows), *cost.shape).flatten(0, 1)  # (R, B, g), R = rows * S
        find = _fit_symmetric if scheme.symmetric else _fit_affine if cost.shape[1] > 1 else _fit_single
        pieces.append(find(x, cost.repeat(len(rows), 1, 1), scheme))
    d, sc, *rest = (torch.cat(parts).reshape(N, -1) for parts in zip(*pieces, strict=True))
    return Superblocks(d, sc, *rest)


def largest_integer(scheme: WeightScheme) -> int:
    """The largest sc, and m, of a grid; see `BlockType.largest`."""
    assert scheme.block_type is not None, "only block types have two levels"
    return BLOCK_TYPES[scheme.block_type].largest


def _fit_affine(x: Tensor, cost: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d (R,), sc (R, B), dmin (R,) and m (R, B) for x and cost (R, B, g)."""
    s, o = _separate(x, cost, scheme.levels)
    largest = largest_integer(scheme)
    d, sc, dmin, m = _share(_Sums.of(x, cost, _nearest(x, s, o, scheme.levels)), s, o, largest)
    for _ in range(SETTLED):
        sc, m = _settled(x, cost, d, sc, dmin, m, scheme.levels, largest)
        d, dmin = _shared_by_least_squares(x, cost, d, sc, dmin, m, scheme.levels)
    return d.to(torch.float16), sc.to(torch.uint8), dmin.to(torch.float16), m.to(torch.uint8)


def _fit_single(x: Tensor, cost: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for superblocks of one sub-block, B = 1: sc and m are 1."""
    s, o = _separate(x, cost, scheme.levels)
    ones = torch.ones_like(s, dtype=torch.uint8)
    return _half(s[:, 0]).to(torch.float16), ones, _half(o[:, 0]).to(torch.float16), ones


def _separate(x: Tensor, cost: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (R, B) of each sub-block alone, by least squares from several shrunken ranges."""
    s, o = _polished(x, cost, *_widest(x, levels), levels)
    least = _error(x, cost, s, o, levels)
    for low, high in product(SHRUNKEN, repeat=2):
        tried = _polished(x, cost, *_widest(x, levels, low, high), levels)
        error = _error(x, cost, *tried, levels)
        better = error < least
        least, s, o = (torch.where(better, *pair) for pair in ((error, least), (tried[0], s), (tried[1], o)))
    for _ in range(POLISHED):
        s, o = _polished(x, cost, s, o, levels)
    return s, o


def _widest(x: Tensor, levels: int, low: float = 1.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and offset (R, B) of the range of x (R, B, g), its ends multiplied by `low` and `high`."""
    o = -low * x.amin(-1).clamp_(max=0)
    s = (high * x.amax(-1).clamp_(min=0) + o) / levels
    return s.clamp_(min=SMALLEST_SHARED), o


def _nearest(x: Tensor, s: Tensor, o: Tensor, levels: int) -> Tensor:
    """The nearest codes (R, B, g) float32."""
    return ((x + o[..., None]) / s[..., None]).round_().clamp_(0, levels)


def _error(x: Tensor, cost: Tensor, s: Tensor, o: Tensor, levels: int) -> Tensor:
    """(R, B): Σ c (ŵ - w)² with the nearest codes."""
    q = _nearest(x, s, o, levels)
    return q.mul_(s[..., None]).sub_(o[..., None]).sub_(x).square_().mul_(cost).sum(-1)


def _polished(x: Tensor, cost: Tensor, s: Tensor, o: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    sums = _Sums.of(x, cost, _nearest(x, s, o, levels))
    slope = (sums.c * sums.cqx - sums.cq * sums.cx) / (sums.c * sums.cqq - sums.cq.square())
    offset = (slope * sums.cq - sums.cx) / sums.c
    through_zero = sums.cqx / sums.cqq  # the best slope where the offset may not be negative
    fitted = torch.where(offset < 0, through_zero, slope)
    usable = torch.isfinite(fitted) & torch.isfinite(offset) & (fitted > 0)
    fitted, offset = torch.where(usable, fitted, s), torch.where(usable, offset.clamp(min=0), o)
    better = _error(x, cost, fitted, offset, levels) < _error(x, cost, s, o, levels)
    return torch.where(better, fitted, s), torch.where(better, offset, o)


def _share(sums: _Sums, s: Tensor, o: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best of several pairs (d, dmin) for fixed codes, with the sc and m that go with it."""
    best = None
    for d in _candidates(s, largest):
        for dmin in _candidates(o, largest):
            error, sc, m = _best_integers(sums, s, d, dmin, largest)
            total = error.sum(1)
            if best is None:
                best = (total, d, sc, dmin, m)
                continue
            better = total < best[0]
            new = (total, d, sc, dmin, m)
            best = tuple(
                torch.where(better if tried.dim() == 1 else better[:, None], tried, old)
                for tried, old in zip(new, best, strict=True)
            )  # type: ignore[assignment]
    assert best is not None
    return best[1:]


def _candidates(values: Tensor, largest: int) -> Iterator[Tensor]:
    """Candidates (R,) for the number whose multiples are the values (R, B), rounded to fp16."""
    unit = values.abs().amax(1) / largest
    for factor in SHARED_FACTORS:
        yield _half(unit * factor)


def _half(values: Tensor) -> Tensor:
    """Rounded to fp16, but never to zero; float32."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(SMALLEST_SHARED, largest).to(torch.float16).to(torch.float32)


def _best_integers(sums: _Sums, s: Tensor, d: Tensor, dmin: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The error (R, B), sc and m of the best of three sc, each with the m that fits it best."""
    nearest = (s / d[:, None]).round_()
    candidates = []
    for step in (-1, 0, 1):
        sc = (nearest + step).clamp_(1, largest)
        scale = d[:, None] * sc
        m = ((scale * sums.cq - sums.cx) / sums.c / dmin[:, None]).round_().nan_to_num_().clamp_(0, largest)
        candidates.append((sums.error(scale, dmin[:, None] * m), sc, m))
    errors, scs, ms = (torch.stack(parts) for parts in zip(*candidates, strict=True))
    error, index = errors.min(0, keepdim=True)
    return error[0], scs.gather(0, index)[0], ms.gather(0, index)[0]


def _settled(
    x: Tensor, cost: Tensor, d: Tensor, sc: Tensor, dmin: Tensor, m: Tensor, levels: int, largest: int
) -> tuple[Tensor, Tensor]:
    """sc and m of least error in the neighbourhood of the given ones, each with the nearest codes."""
    least = _error(x, cost, d[:, None] * sc, dmin[:, None] * m, levels)
    best_sc, best_m = sc, m
    for up in range(-NEAR, NEAR + 1):
        for over in range(-NEAR, NEAR + 1):
            tried, tried_m = (sc + up).clamp(1, largest), (m + over).clamp(0, largest)
            error = _error(x, cost, d[:, None] * tried, dmin[:, None] * tried_m, levels)
            better = error < least
            least = torch.where(better, error, least)
            best_sc, best_m = torch.where(better, tried, best_sc), torch.where(better, tried_m, best_m)
    return best_sc, best_m


def _shared_by_least_squares(
    x: Tensor, cost: Tensor, d: Tensor, sc: Tensor, dmin: Tensor, m: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """d and dmin (R,) of least error for the nearest codes; the old ones where these are at least as good."""
    sums = _Sums.of(x, cost, _nearest(x, d[:, None] * sc, dmin[:, None] * m, levels))
    a, b, c = (sc * sc * sums.cqq).sum(1), (sc * m * sums.cq).sum(1), (m * m * sums.c).sum(1)
    right, down = (sc * sums.cqx).sum(1), (m * sums.cx).sum(1)  # of d, and of -dmin
    determinant = a * c - b * b
    fitted, fitted_min = (c * right - b * down) / determinant, (b * right - a * down) / determinant
    usable = torch.isfinite(fitted) & torch.isfinite(fitted_min) & (fitted > 0) & (fitted_min > 0)
    new, new_min = (_half(torch.where(usable, fit_, old)) for fit_, old in ((fitted, d), (fitted_min, dmin)))
    errors = [
        _error(x, cost, scale[:, None] * sc, offset[:, None] * m, levels).sum(1)
        for scale, offset in ((new, new_min), (d, dmin))
    ]
    better = errors[0] < errors[1]
    return torch.where(better, new, d), torch.where(better, new_min, dmin)


def _fit_symmetric(x: Tensor, cost: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """d (R,) and sc (R, B) for x and cost (R, B, g).

    A weight is its scale times what its code stands for, so the best scale for fixed codes has a closed form.
    """
    largest = largest_integer(scheme)
    units, top = _units(x, scheme)

    def error(scales: Tensor) -> Tensor:
        return units(scales).mul_(scales[..., None]).sub_(x).square_().mul_(cost).sum(-1)

    def sums(scales: Tensor) -> _Sums:
        return _Sums.of(x, cost, units(scales))

    def polished(scales: Tensor) -> Tensor:
        current = sums(scales)
        fitted = current.cqx / current.cqq
        better = torch.isfinite(fitted) & (fitted != 0) & (error(fitted) < error(scales))
        return torch.where(better, fitted, scales)

    widest = (x.abs().amax(-1) / top).clamp_(min=SMALLEST_SHARED)
    starts = torch.stack([polished(sign * factor * widest) for factor in SHRUNKEN_SYMMETRIC for sign in (-1, 1)])
    s = starts.gather(0, torch.stack([error(start) for start in starts]).argmin(0, keepdim=True))[0]
    for _ in range(POLISHED):
        s = polished(s)
    if x.shape[1] == 1:
        d = _half(s.abs()).copysign(s)[:, 0]
        return d.to(torch.float16), torch.ones_like(s, dtype=torch.int8)
    current, zero = sums(s), torch.zeros_like(s)
    tried = torch.stack(list(_candidates(s, largest)))  # (T, R)
    integers = _signed(s / tried[..., None], s, largest)
    errors = [current.error(d[:, None] * sc, zero).sum(1) for d, sc in zip(tried, integers, strict=True)]
    best = torch.stack(errors).argmin(0)
    d, sc = tried.gather(0, best[None])[0], integers[best, torch.arange(len(s), device=s.device)]
    for _ in range(SETTLED):
        steps = torch.stack([_signed(sc + step, sc, largest) for step in range(-NEAR, NEAR + 1)])
        chosen = torch.stack([error(d[:, None] * step) for step in steps]).argmin(0)
        sc = steps.gather(0, chosen[None])[0]
        current = sums(d[:, None] * sc)
        fitted = (sc * current.cqx).sum(1) / (sc * sc * current.cqq).sum(1)
        fitted = _half(torch.where(torch.isfinite(fitted), fitted, d))
        d = torch.where(error(fitted[:, None] * sc).sum(1) < error(d[:, None] * sc).sum(1), fitted, d)
    return d.to(torch.float16), sc.to(torch.int8)


def _units(x: Tensor, scheme: WeightScheme) -> tuple[Callable[[Tensor], Tensor], float]:
    """From scales (R, B) to what x (R, B, g) is rounded to, in units of them; and the largest of these numbers."""
    table, levels, middle = value_table(scheme), scheme.levels, scheme.middle
    if table is not None:
        return lambda scales: table.rounded(x / scales[..., None]), table.top
    return lambda scales: _nearest(x, scales, scales * middle, levels).sub_(middle), float(middle)


def _signed(values: Tensor, like: Tensor, largest: int) -> Tensor:
    """Rounded to integers with a sign; instead of zero 1 with the sign of `like`."""
    whole = values.round().clamp_(-largest - 1, largest)
    return torch.where(whole == 0, torch.ones_like(whole).copysign(like), whole)
