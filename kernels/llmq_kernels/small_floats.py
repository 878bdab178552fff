"""Floats of four and eight bits, by their place in ascending order: *codes* 0, 1, 2, … stand for the values.

    E2M1   code   0   1   2   3     4   5    6    7   8    9   10   11   12  13  14
           value -6  -4  -3  -2  -1.5  -1  -.5   0  .5    1  1.5    2    3   4   6

    E4M3   codes 0 to 252 stand for -448 to 448, all finite values of float8_e4m3fn

So the next code is the next value, and a code can move by one step as on an integer grid.  The two zeros of these types
are one code.  Values in the middle between two others are rounded down.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SmallFloat:
    """A type of small floats, by its `magnitudes` in ascending order, of which the first is 0."""

    magnitudes: tuple[float, ...]

    @property
    def zero(self) -> int:
        """The code of 0."""
        return len(self.magnitudes) - 1

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2 * self.zero

    @property
    def top(self) -> float:
        """The largest value."""
        return self.magnitudes[-1]

    def values(self, codes: Tensor) -> Tensor:
        """Codes of any shape and integer dtype -> float32."""
        return self._ladder(codes.device)[codes.long()]

    def nearest(self, x: Tensor) -> Tensor:
        """The codes, uint8, of the values next to float32 `x`."""
        ladder = self._ladder(x.device)
        return torch.bucketize(x.contiguous(), (ladder[1:] + ladder[:-1]) / 2, out_int32=True).to(torch.uint8)

    def places(self, x: Tensor) -> Tensor:
        """Where `x` lies among the codes, float32: whole numbers at values, in proportion between them."""
        ladder = self._ladder(x.device)
        below = (torch.bucketize(x.contiguous(), ladder, right=True) - 1).clamp_(0, self.largest - 1)
        low, high = ladder[below], ladder[below + 1]
        return ((x - low) / (high - low)).add_(below).clamp_(0, self.largest)

    def distances(self, place: Tensor) -> Tensor:
        """The distance between the two values around a place of `places`, float32; it is the slope there."""
        return self._ladder(place.device).diff()[place.floor().long().clamp_(0, self.largest - 1)]

    def _ladder(self, device: torch.device) -> Tensor:
        """All values, in ascending order."""
        positive = torch.tensor(self.magnitudes, device=device)
        return torch.cat([-positive.flip(0)[:-1], positive])


E2M1 = SmallFloat((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3 = SmallFloat(tuple(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()))
SMALL_FLOATS: Mapping[str, SmallFloat] = {"e2m1": E2M1, "e4m3": E4M3}
