"""Take over the grid that a weight already lies on: its codes and scales, without a second rounding.

`keep` tries to store a weight on a scheme without any error, and verifies the result weight by weight:

    scale * (code - zero), rounded to the dtype of the checkpoint, is the weight, bit for bit

Scales are chosen among the numbers that the file has for them.  So scales that were float16 or bfloat16 before the
weights were computed are recovered exactly, wherever the format has that dtype.  If it has not (float16 scales in a
format with bfloat16 scales), the codes are exact and each scale is the nearest one, which costs 0.2 % at most.

A group of the scheme may be a part of a group of the grid, and the scheme may have more levels than the grid.  Codes
are the quantized values, zeros the zero points.  Grids of floats: `keep_floats.py`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.numerics import lattice
from llmq.numerics.affine_grid import SMALLEST_SCALE, SMALLEST_SCALE_ELSEWHERE, Bounded, ScaleDtype, dtype_of
from llmq.numerics.existing_grid import EVIDENCE, SAMPLED, plausible, sample
from llmq.numerics.keep_floats import keep_floats
from llmq.numerics.lattice import DIGITS, Intervals, Lines, Steps
from llmq.numerics.quantized_tensor import SMALLEST_SHARED, QuantizedTensor, Superblocks
from llmq.numerics.scheme import WeightScheme

NEAR_D, NEAR_M = 3, 24  # numbers of float16 below and above the start of a search
ELEMENTS_AT_ONCE = {"cpu": 1 << 17}  # fits into its cache
ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Kept:
    """A weight on its existing grid.

    exact  whether the weights are equal, bit for bit, once they are rounded to the dtype of the checkpoint; otherwise
           only scales were rounded
    """

    quantized: QuantizedTensor
    exact: bool


def keep(weight: Tensor, stored: torch.dtype, scheme: WeightScheme, values: ScaleDtype) -> Kept | None:
    """The weight (N, K) float32 on its existing grid, if all groups of `scheme` lie on one that `scheme` holds.

    stored  the dtype of the checkpoint
    values  the values that the file has for scales
    """
    if scheme.floats is not None and stored in DIGITS:
        floats = keep_floats(weight, stored, scheme, values)
        return None if floats is None else Kept(floats, exact=True)
    N, K = weight.shape
    width = scheme.columns_per_group(K)
    if (
        stored not in DIGITS
        or scheme.table
        or scheme.group_size == "tensor"
        or K % width
        or (scheme.two_level and not _free(scheme))
    ):
        return None
    problem = _Problem(scheme, stored, values)
    x = weight.reshape(-1, width)
    if not plausible(x, stored, problem.counts[0], offsets=scheme.two_level):
        return None
    few = sample(x, SAMPLED)
    first = problem.solve(few, problem.counts)
    if not bool(first.fits.all()) or problem.evidence(few, first) < EVIDENCE:
        return None
    problem = problem.after(first, few)
    codes, groups = [], []
    for part in x.split(max(1, ELEMENTS_AT_ONCE.get(x.device.type, ELEMENTS_AT_ONCE_ELSEWHERE) // width)):
        solved = problem.solve(part, problem.counts)
        if not bool(solved.fits.all()):
            return None
        codes.append(_codes(part, solved, scheme))
        groups.append(solved)
    together = _Groups(*(torch.cat([getattr(g, name) for g in groups]) for name in _Groups.names()))
    return Kept(_assembled(torch.cat(codes).reshape(N, K), together, scheme, values), bool(together.exact.all()))


def _free(scheme: WeightScheme) -> bool:
    """Whether scale and offset of each group are independent numbers, which those of K-quants are not."""
    return scheme.block_type == "q4_1"


@dataclass
class _Groups:
    """What is known about R groups.

    fits, exact   (R,) bool: whether they lie on a grid, and whether they do with the scale in the file
    count         (R,) how many steps the largest weight has
    step, offset  (R,) float64: w = step * (code - zero) + offset; one of zero and offset is 0
    zero          (R,) float64
    scale         (R,) float32, `step` in the dtype of the file
    """

    fits: Tensor
    exact: Tensor
    count: Tensor
    step: Tensor
    zero: Tensor
    offset: Tensor
    scale: Tensor

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    def put(self, rows: Tensor, other: "_Groups") -> None:
        """Replace the groups `rows` (P,) by those of `other` (P) that fit better."""
        better = other.exact | (other.fits & ~self.fits[rows])
        for name in self.names():
            getattr(self, name)[rows[better]] = getattr(other, name)[better]


@dataclass(frozen=True)
class _Problem:
    """The scheme to store a weight on.

    given         the numbers of steps of the largest weight to try, in this order; None: all, the most first
    rounds_scales  whether a group is accepted without looking for a number of steps with which it is exact
    """

    scheme: WeightScheme
    stored: torch.dtype
    values: ScaleDtype
    given: tuple[int, ...] | None = None
    rounds_scales: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        most = self.scheme.middle if self.scheme.symmetric else self.scheme.levels
        return self.given or tuple(range(most, 0, -1))

    @property
    def smallest(self) -> float:
        """The smallest scale that the file may have; llmq and llama.cpp read subnormal numbers in blocks of GGUF."""
        if isinstance(self.values, Bounded):
            return self.values.smallest
        if self.scheme.block_type:
            return SMALLEST_SHARED
        return SMALLEST_SCALE.get(dtype_of(self.values), SMALLEST_SCALE_ELSEWHERE)

    def after(self, groups: _Groups, x: Tensor) -> "_Problem":
        """The same problem with the experience from some groups: the most frequent number of steps comes first."""
        often = torch.bincount(groups.count, minlength=max(self.counts) + 1).tolist()
        rounds = float(groups.exact[(x != 0).any(1)].double().mean()) < 0.5
        return dataclasses.replace(
            self, given=tuple(sorted(self.counts, key=lambda n: -often[n])), rounds_scales=rounds
        )

    def evidence(self, x: Tensor, groups: _Groups) -> float:
        nonzero = (x != 0).any(1)
        free = 1 + self.scheme.two_level
        bits = lattice.evidence(x[nonzero], self.stored, groups.step[nonzero].abs(), groups.count[nonzero], free)
        return float(bits.sum())

    def solve(self, x: Tensor, counts: tuple[int, ...]) -> _Groups:
        """The grids of the groups x (R, g)."""
        result = self._unsolved(x)
        if self.scheme.two_level:
            self._put_constant(x, result)
        for n in counts:
            rows = (~(result.fits if self.rounds_scales else result.exact)).nonzero()[:, 0]
            if not len(rows):
                break
            (self._put_lines if self.scheme.two_level else self._put_multiples)(x, rows, n, result)
        return result

    def _unsolved(self, x: Tensor) -> _Groups:
        """No group is solved except those that are all zero; their scale is the smallest one."""
        zeros, plain = (x == 0).all(1), torch.ones(len(x), dtype=torch.float64, device=x.device)
        middle = self.scheme.middle if self.scheme.symmetric else 0
        scale = _in_file(plain * self.smallest, self.values, self.smallest)
        return _Groups(zeros, zeros.clone(), zeros * 1, scale.double(), plain * middle, plain * 0, scale)

    def _put_multiples(self, x: Tensor, rows: Tensor, n: int, result: _Groups) -> None:
        intervals = Intervals.of(x[rows], self.stored)
        steps = lattice.steps(intervals, torch.full((len(rows),), n, device=x.device))
        likely = steps.plausible.nonzero()[:, 0]
        if len(likely):
            result.put(rows[likely], self._on_multiples(x[rows[likely]], steps.rows(likely), n))

    def _on_multiples(self, x: Tensor, steps: Steps, n: int) -> _Groups:
        """The groups x (P, g) whose largest weight is `n` of these steps."""
        size, exact = x.abs(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        scale = _in_file(steps.middle, self.values, self.smallest)
        for candidate in self._scales(steps):
            open_ = (~exact).nonzero()[:, 0]
            if not len(open_):
                break
            s = candidate[open_, None]
            same = self._equal((size[open_] / s).round_().mul_(s), size[open_]) & (s[:, 0] >= self.smallest)
            exact[open_[same]], scale[open_[same]] = True, s[same, 0]
        step = torch.where(exact, scale.double(), steps.middle.double())
        near = steps.fits & ((scale - step).abs() <= torch.finfo(dtype_of(self.values)).eps * step)
        k = (x.double() / step[:, None]).round_()
        low, high = k.amin(1).clamp_(max=0), k.amax(1).clamp_(min=0)
        if self.scheme.symmetric:
            middle = self.scheme.middle
            positive = (high < middle) & (low >= -middle)
            held, zero = positive | ((-low < middle) & (high <= middle)), torch.full_like(step, middle)
            sign = torch.where(positive, 1.0, -1.0).double()
        else:
            held, zero, sign = high - low <= self.scheme.levels, -low, torch.ones_like(step)
        fits, exact, count = (exact | near) & held, exact & held, torch.full_like(rows_of(x), n)
        return _Groups(fits, exact, count, step * sign, zero, step * 0, scale * sign.to(torch.float32))

    def _scales(self, steps: Steps) -> Iterator[Tensor]:
        """Scales (P,) that the file has, near the middle of what the weights allow."""
        dtype = dtype_of(self.values)
        near = _in_file(torch.where(steps.fits, steps.middle, steps.near_middle), self.values, self.smallest)
        yield near
        yield from _neighbours(near, dtype, 2)
        yield _in_file(steps.near_middle, self.values, self.smallest)

    def _put_constant(self, x: Tensor, result: _Groups) -> None:
        """A group of equal weights is an offset."""
        m = x[:, 0].to(torch.float16).to(torch.float32)
        rows = ((x == x[:, :1]).all(1) & self._equal(m[:, None], x[:, :1])).nonzero()[:, 0]
        result.fits[rows] = result.exact[rows] = True
        result.offset[rows] = m[rows].double()

    def _put_lines(self, x: Tensor, rows: Tensor, n: int, result: _Groups) -> None:
        rows = rows[x[rows].amin(1) < x[rows].amax(1)]
        if not len(rows):
            return
        bounds = lattice.signed(x[rows], self.stored)
        line = lattice.lines(x[rows], bounds, torch.full((len(rows),), n, device=x.device))
        likely = line.plausible.nonzero()[:, 0]
        if len(likely):
            chosen = (bounds[0][likely], bounds[1][likely])
            result.put(rows[likely], self._on_lines(x[rows[likely]], chosen, line.rows(likely), n))

    def _on_lines(self, x: Tensor, bounds: tuple[Tensor, Tensor], line: Lines, n: int) -> _Groups:
        """The groups x (P, g) on these lines, with d and m in float16."""
        exact = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        scale, offset = (part.to(torch.float16).to(torch.float32) for part in (line.d, line.m))
        for shift in range(1 if self.rounds_scales else self.scheme.levels - n + 1):  # the lowest code that is used
            moved = Lines(line.d, line.m - shift * line.d, line.q + shift, line.plausible)
            for d, m in self._pairs(bounds, moved, exact):
                open_ = (~exact).nonzero()[:, 0]
                product = d[:, None] * moved.q[open_].to(torch.float32)
                same = self._equal(product + m[:, None], x[open_]) & (d >= self.smallest)
                exact[open_[same]], scale[open_[same]], offset[open_[same]] = True, d[same], m[same]
        step, start, fits = scale.double(), offset.double(), exact.clone()
        open_ = (~exact).nonzero()[:, 0]
        if len(open_):
            real, allowed = lattice.settled((bounds[0][open_], bounds[1][open_]), line.rows(open_))
            halves = real.d.to(torch.float16).double()
            fits[open_] = allowed & ((halves - real.d).abs() <= torch.finfo(torch.float16).eps * real.d)
            step[open_], start[open_], scale[open_] = real.d, real.m, halves.to(torch.float32)
        count = torch.full_like(rows_of(x), n)
        return _Groups(fits, exact, count, step, step * 0, start, scale)

    def _pairs(self, bounds: tuple[Tensor, Tensor], line: Lines, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of d and m in float16, as float32, for the lines that are not `exact` when the next pair is requested.

        At first d is near least squares, and m is the best for this d.  Where float16 is coarser for m than the weights
        are, the pairs start from m.
        """
        halves = [part.to(torch.float16).to(torch.float32) for part in (line.d, line.m)]
        for start, reach, best in ((halves[0], NEAR_D, lattice.offsets), (halves[1], NEAR_M, lattice.slopes)):
            for candidate in (start, *_neighbours(start, torch.float16, 0 if self.rounds_scales else reach)):
                open_ = (~exact).nonzero()[:, 0]
                if not len(open_):
                    return
                given = candidate[open_]
                low, high = best((bounds[0][open_], bounds[1][open_]), line.q[open_], given.double())
                other = ((low + high) / 2).to(torch.float16).to(torch.float32)
                yield (given, other) if best is lattice.offsets else (other, given)

    def _equal(self, values: Tensor, x: Tensor) -> Tensor:
        """(R,) whether the values (R, g) float32 are x (R, g), once rounded to the dtype of the checkpoint."""
        return (values.to(self.stored).to(torch.float32) == x).all(1)


def rows_of(x: Tensor) -> Tensor:
    """(R,) int64, the numbers of the rows of x."""
    return torch.arange(len(x), device=x.device)


def _codes(x: Tensor, groups: _Groups, scheme: WeightScheme) -> Tensor:
    """(R, g) uint8."""
    shifted = (x.double() - groups.offset[:, None]) / groups.step[:, None]
    return (shifted + groups.zero[:, None]).round_().clamp_(0, scheme.levels).to(torch.uint8)


def _assembled(codes: Tensor, groups: _Groups, scheme: WeightScheme, values: ScaleDtype) -> QuantizedTensor:
    N = len(codes)
    if scheme.two_level:
        d, dmin = (part.to(torch.float16).reshape(N, -1) for part in (groups.scale, -groups.offset))
        ones = torch.ones_like(d, dtype=torch.uint8)
        return QuantizedTensor.of_superblocks(codes, Superblocks(d, ones, dmin, ones), scheme)
    scales = groups.scale.to(dtype_of(values)).reshape(N, -1)
    zeros = None if scheme.symmetric else groups.zero.to(torch.int16).reshape(N, -1)
    return QuantizedTensor(codes, scales, zeros, scheme)


def _in_file(steps: Tensor, values: ScaleDtype, smallest: float) -> Tensor:
    """Positive steps as the file holds them, float32."""
    return steps.to(torch.float32).clamp(min=smallest).to(dtype_of(values)).to(torch.float32)


def _neighbours(scales: Tensor, dtype: torch.dtype, reach: int) -> Iterator[Tensor]:
    """The numbers of `dtype` next to `scales`, as float32; the nearest first."""
    bits = scales.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    for step in range(1, reach + 1):
        for away in (-step, step):
            yield (bits + away).view(dtype).to(torch.float32).nan_to_num_(0.0, 0.0, 0.0)
