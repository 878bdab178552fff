"""Fit each group of weights to the multiples of one step, or to multiples plus an offset, and report whether they fit.

    w  =  round(s k)          k an integer                       every affine grid with integer zero points
    w  =  round(d q + m)      q in 0 … 2**bits - 1, m real       Q4_1

`round` is the rounding to the dtype of the checkpoint: 8, 11 or 24 binary digits.  So a weight w stands for an interval
[w - a, w + b], with a and b half the distances to the neighbours of w in that dtype.  If the largest weight of a group
is n steps,

    s in [(|w| - a) / |k|, (|w| + b) / |k|]          k = round(w / s)

for each weight, and the weights lie on the multiples of a step where the intervals of all of them intersect.  n is
unknown and tried.  For large n the first estimate of s is too inexact to determine the large k, so the intervals of
small k come first.

Fitting alone is not evidence: two weights fit on many grids.  A weight at a random place fits with the probability
(a + b) / s, so that log2(s / (a + b)) bits speak for the grid.  `evidence` counts them per different value, without
those values that determine the step, and minus the log2(n) bits for the choice of n.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # binary digits, by the dtype of the checkpoint
SMALLEST_HALF = {torch.float16: 2.0**-25}  # half the distance of float16 subnormals
STAGES = (20, 64, 256)  # the largest |k| of the intervals that are intersected in this stage
RELIABLE = 64  # up to this |k|, the rounding of bfloat16 cannot hide which multiple a weight is
SLACK = 1 + 2.0**-12  # for the rounding errors of float32
FAR = 4.0  # half intervals that a weight may be away from a line of least squares
CUTS = 24


@dataclass(frozen=True)
class Intervals:
    """The weights |x| (R, g), and the smallest and largest number that is rounded to each of them."""

    size: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor, stored: torch.dtype) -> "Intervals":
        """The intervals of x (R, g) float32, in a dtype with more digits than the checkpoint has."""
        dtype = torch.float64 if stored == torch.float32 else torch.float32
        size = x.abs().contiguous()
        bits = size.view(torch.int32)
        half = (bits & 0x7F800000).view(torch.float32).to(dtype) * (2.0 ** -DIGITS[stored] * SLACK)
        half = half.clamp_(min=SMALLEST_HALF.get(stored, 0.0))
        below = torch.where((bits & 0x7FFFFF) == 0, half / 2, half)  # the numbers below a power of two are denser
        size = size.to(dtype)
        return cls(size, size - below, size + half)

    def rows(self, chosen: Tensor) -> "Intervals":
        return Intervals(self.size[chosen], self.low[chosen], self.high[chosen])


@dataclass(frozen=True)
class Steps:
    """The steps s (R,) that R groups allow: [low, high] for all weights, [near_low, near_high] for small multiples.

    fits  (R,) whether [low, high] is not empty, and no weight except zero is the multiple 0
    """

    low: Tensor
    high: Tensor
    near_low: Tensor
    near_high: Tensor
    fits: Tensor

    @property
    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def near_middle(self) -> Tensor:
        return (self.near_low + self.near_high) / 2

    @property
    def plausible(self) -> Tensor:
        """(R,) whether the small multiples fit."""
        return self.near_low <= self.near_high

    def rows(self, chosen: Tensor) -> "Steps":
        return Steps(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def steps(x: Intervals, counts: Tensor) -> Steps:
    """The steps of groups whose largest weight is `counts` (R,) steps; no group may be all zero."""
    n, top = counts.to(x.size.dtype), int(counts.max())
    low, high = x.low.amax(1) / n, x.high.amax(1) / n
    near, nonzero = (low, high), torch.ones_like(low, dtype=torch.bool)
    for limit in STAGES:
        k = (x.size / ((low + high) / 2)[:, None]).round_()
        used = (k > 0) & (k <= limit)
        low = torch.maximum(low, torch.where(used, x.low / k, 0.0).amax(1))
        high = torch.minimum(high, torch.where(used, x.high / k, torch.inf).amin(1))
        if limit <= RELIABLE:
            near = (low, high)
        if top <= limit:
            nonzero = ((k == 0) == (x.size == 0)).all(1)
            break
    return Steps(low, high, *near, (low <= high) & nonzero)


@dataclass(frozen=True)
class Lines:
    """The lines d q + m through R groups by least squares, d and m (R,) float64, and the codes q (R, g).

    plausible  (R,) whether no weight is far from its line
    """

    d: Tensor
    m: Tensor
    q: Tensor
    plausible: Tensor

    def rows(self, chosen: Tensor) -> "Lines":
        return Lines(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def signed(x: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number (R, g) float64 that is rounded to x (R, g) float32, a sum in float32."""
    intervals = Intervals.of(x, stored)
    slack = 2.0 ** -DIGITS[torch.float32] * x.abs().amax(1, keepdim=True).to(torch.float64)
    low, high = intervals.low.to(torch.float64), intervals.high.to(torch.float64)
    negative = x < 0
    return torch.where(negative, -high, low) - slack, torch.where(negative, -low, high) + slack


def lines(x: Tensor, bounds: tuple[Tensor, Tensor], counts: Tensor) -> Lines:
    """The lines of the groups x (R, g) float32 whose range is `counts` (R,) steps; no group may be constant.

    bounds  the result of `signed`.  A weight with a small interval determines its line more than others
    """
    x, half = x.to(torch.float64), (bounds[1] - bounds[0]) / 2
    lowest, highest = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    q = ((x - lowest) * (counts[:, None] / (highest - lowest))).round_()
    weight = half.clamp(min=2.0**-12 * half.amax(1, keepdim=True)).pow(-2)
    weight /= weight.sum(1, keepdim=True)
    mean_q, mean_x = ((weight * part).sum(1, keepdim=True) for part in (q, x))
    d = (weight * (q - mean_q) * (x - mean_x)).sum(1) / (weight * (q - mean_q).square()).sum(1)
    m = mean_x[:, 0] - d * mean_q[:, 0]
    away = (d[:, None] * q).add_(m[:, None]).sub_(x).abs_()
    return Lines(d, m, q, (away <= FAR * half).all(1) & (d > 0))


def offsets(bounds: tuple[Tensor, Tensor], q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest m (R,) for which d q + m fits all weights, at fixed d (R,) and q (R, g).

    There is none where the smallest is above the largest.
    """
    product = d[:, None] * q
    return (bounds[0] - product).amax(1), (bounds[1] - product).amin(1)


def slopes(bounds: tuple[Tensor, Tensor], q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest d (R,) for which d q + m fits all weights, at fixed m (R,) and q (R, g)."""
    low, high = ((bound - m[:, None]) / q for bound in bounds)
    return torch.where(q > 0, low, -torch.inf).amax(1), torch.where(q > 0, high, torch.inf).amin(1)


def settled(bounds: tuple[Tensor, Tensor], line: Lines) -> tuple[Lines, Tensor]:
    """The lines in the middle of what all weights allow, and whether they allow any (R,).

    The width of the range of m is a concave function of d, so its largest value is found by cutting the range of d.
    """
    reach = FAR * (bounds[1] - bounds[0]).amax(1) / line.q.amax(1)
    left, right = line.d - reach, line.d + reach
    for _ in range(CUTS):
        points = [left + (right - left) * share for share in (0.4, 0.6)]
        widths = [high - low for low, high in (offsets(bounds, line.q, point) for point in points)]
        rising = widths[0] < widths[1]
        left, right = torch.where(rising, points[0], left), torch.where(rising, right, points[1])
    d = (left + right) / 2
    low, high = offsets(bounds, line.q, d)
    fits = (low <= high) & (d > 0)
    return Lines(d, (low + high) / 2, line.q, fits), fits


def evidence(x: Tensor, stored: torch.dtype, step: Tensor, counts: Tensor, free: int) -> Tensor:
    """(R,) bits that speak for the steps of the groups x (R, g); `free` values of each group determined its grid."""
    ordered = x.sort(dim=1).values
    different = torch.ones_like(ordered, dtype=torch.bool)
    different[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    intervals = Intervals.of(ordered, stored)
    widths = (intervals.high - intervals.low).to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)
    bits = (step.to(torch.float32)[:, None] / widths).log2_().clamp_(0, DIGITS[stored])
    bits = torch.where(different & (ordered != 0), bits, 0.0)
    cost = counts.clamp(min=1).to(torch.float32).log2() + 1 + free * bits.amax(1)
    return (bits.sum(1) - cost).clamp_(min=0)
