"""Identify the grid that weights already lie on, from a few of their rows.

Weights that were trained for quantization, or dequantized, lie on an affine grid per group.  A second rounding uses
another step, and costs as much as the first.  So llmq reports such a grid, and stores it where the format can hold it
(`keep_grid.py`).  The maths of a group is in `lattice.py`.

First a few groups of 16 columns are compared with all grids.  Float weights end here.  Then the largest group size is
chosen with which (almost) the same share of the groups fits.  Float weights never pass: the groups together need
evidence of 2**64 to one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmq.numerics import lattice
from llmq.numerics.lattice import DIGITS, Intervals
from llmq.numerics.scheme import GroupSize

EVIDENCE, EVIDENCE_OF_SIZE = 64.0, 16.0  # bits
FEW, SAMPLED = 8, 64  # groups that are looked at first, and then
SMALLEST_GROUP = 16
SIZES = (128, 64, 32, 16)
MOST_STEPS = 255  # of the largest weight from zero: that of a grid of 8 bits
MOST_LEVELS = 15  # of a grid with real offsets
MOSTLY = 0.5  # a smaller share of groups on a grid is not reported
SAME_SHARE = 0.98  # a larger group size is the one of the grid if at least this part of the groups still fits

Kind = Literal["symmetric", "asymmetric", "offsets"]


@dataclass(frozen=True)
class ExistingGrid:
    """The grid of a weight.

    kind   "symmetric", "asymmetric" (integer zero points), or "offsets" (real numbers, as in Q4_1)
    share  of its groups that lie on it; below 1 the weight is quantized as usual
    """

    bits: int
    group_size: GroupSize
    kind: Kind
    share: float = 1.0

    def __str__(self) -> str:
        size = f"of {self.group_size}" if isinstance(self.group_size, int) else "with one scale per row"
        kind = {"symmetric": "", "asymmetric": " with zero points", "offsets": " with offsets"}[self.kind]
        return f"{self.bits}-bit grid {size}{kind}"


def identify(rows: Tensor, stored: torch.dtype) -> ExistingGrid | None:
    """The grid of a weight, from some of its rows (n, K) float32; None for float weights.

    stored  the dtype of the checkpoint
    """
    K = rows.shape[1]
    if stored not in DIGITS or K < SMALLEST_GROUP or not rows.numel():
        return None
    narrow = _grouped(rows, SMALLEST_GROUP)
    kinds = [kind for kind in (False, True) if _fit(sample(narrow, FEW), stored, kind, MOST_STEPS).share >= MOSTLY]
    fits = [(_fit(sample(narrow, SAMPLED), stored, offsets, MOST_STEPS), offsets) for offsets in kinds]
    fits = [(fit, kind) for fit, kind in fits if fit.share >= MOSTLY and fit.evidence >= EVIDENCE and fit.bits <= 8]
    if not fits:
        return None
    best = max(fit.share for fit, _ in fits)
    fit, offsets = min(((f, o) for f, o in fits if f.share >= SAME_SHARE * best), key=lambda pair: pair[0].bits)
    sizes: list[GroupSize] = ["channel", *(size for size in SIZES if K % size == 0)]
    for size in sizes:
        groups = _grouped(rows, size if isinstance(size, int) else K)
        wider = _fit(sample(groups, SAMPLED), stored, offsets, 1 << fit.bits)
        if wider.share >= SAME_SHARE * fit.share and wider.evidence >= EVIDENCE_OF_SIZE:
            return ExistingGrid(wider.bits, size, wider.kind, wider.share)
    return None


def sample(x: Tensor, count: int) -> Tensor:
    """At most `count` of the groups x (R, g), evenly distributed."""
    if len(x) <= count:
        return x
    return x[torch.linspace(0, len(x) - 1, count, device=x.device).long()]


def plausible(x: Tensor, stored: torch.dtype, most: int, *, offsets: bool) -> bool:
    """Whether each of a few groups x (R, g) fits on some grid of at most `most` steps: a cheap test for `keep`."""
    few = sample(x, FEW)[:, : 4 * SMALLEST_GROUP]  # a part of a group on a grid is on the same grid
    return _fit(few, stored, offsets, most).share == 1.0


@dataclass(frozen=True)
class _Fit:
    """How a sample of groups fits on grids of one kind: the share that fits, the bits needed, and the evidence."""

    share: float
    bits: int = 0
    kind: Kind = "symmetric"
    evidence: float = 0.0


def _grouped(rows: Tensor, width: int) -> Tensor:
    """(n, K) -> (R, width); columns after the last whole group are left out."""
    return rows[:, : rows.shape[1] // width * width].reshape(-1, width)


def _fit(x: Tensor, stored: torch.dtype, offsets: bool, most: int) -> _Fit:
    """Fit the groups x (R, g) with all numbers of steps up to `most`.

    A constant group does not count: it fits on every grid.
    """
    x = x[x.amin(1) < x.amax(1)]
    if not len(x):
        return _Fit(1.0)
    counts = torch.arange(1, (min(most, MOST_LEVELS) if offsets else most) + 1, device=x.device)
    many, n = x.repeat_interleave(len(counts), 0), counts.repeat(len(x))
    fits, step = _on_lines(many, stored, n) if offsets else _on_multiples(many, stored, n)
    fits, step = fits.reshape(len(x), -1), step.reshape(len(x), -1)
    fitted, place = fits.any(1), fits.to(torch.uint8).argmax(1, keepdim=True)  # the coarsest step that fits
    share = float(fitted.double().mean())
    x, step, n = x[fitted], step.gather(1, place)[fitted, 0], counts[place[fitted, 0]]
    if not len(x):
        return _Fit(0.0)
    evidence = float(lattice.evidence(x, stored, step, n, free=1 + offsets).sum())
    if offsets:
        return _Fit(share, max(2, int(n.max()).bit_length()), "offsets", evidence)
    k = (x / step[:, None]).round_()
    low, high = k.amin(1).clamp_(max=0), k.amax(1).clamp_(min=0)
    asymmetric = max(2, int((high - low).max()).bit_length())
    outermost = torch.minimum(torch.maximum(high, -low - 1), torch.maximum(-low, high - 1))  # for either sign of scales
    symmetric = max(2, int(outermost.max()).bit_length() + 1)
    kind: Kind = "symmetric" if symmetric <= asymmetric else "asymmetric"
    return _Fit(share, min(symmetric, asymmetric), kind, evidence)


def _on_multiples(x: Tensor, stored: torch.dtype, n: Tensor) -> tuple[Tensor, Tensor]:
    steps = lattice.steps(Intervals.of(x, stored), n)
    return steps.fits, steps.middle


def _on_lines(x: Tensor, stored: torch.dtype, n: Tensor) -> tuple[Tensor, Tensor]:
    bounds = lattice.signed(x, stored)
    line = lattice.lines(x, bounds, n)
    rows = line.plausible.nonzero()[:, 0]
    fits, step = torch.zeros_like(line.plausible), line.d.clone()
    if len(rows):
        settled, allowed = lattice.settled((bounds[0][rows], bounds[1][rows]), line.rows(rows))
        fits[rows], step[rows] = allowed, settled.d
    return fits, step
