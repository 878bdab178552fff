"""Grids that are not uniform: the values that *codes* 0, 1, 2, … stand for, in ascending order.

    E2M1   code   0   1   2   3     4   5    6    7   8    9   10   11   12  13  14
           value -6  -4  -3  -2  -1.5  -1  -.5   0  .5    1  1.5    2    3   4   6

    E4M3   codes 0 to 252 stand for -448 to 448, all finite values of float8_e4m3fn

    IQ4    code     0     1    2    3    4    5    6    7  8   9  10  11  12  13  14   15
           value -127  -104  -83  -65  -49  -35  -22  -10  1  13  25  38  53  69  89  113

So the next code is the next value, and a code can move by one step as on an integer grid.  The two zeros of small
floats are one code; IQ4 (llama.cpp's IQ4_NL and IQ4_XS) has no zero.  Values in the middle between two others are
rounded down.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ValueTable:
    """The values that codes stand for, in ascending order."""

    numbers: tuple[float, ...]

    @classmethod
    def symmetric(cls, magnitudes: tuple[float, ...]) -> "ValueTable":
        """The magnitudes, of which the first is 0, with both signs."""
        return cls((*(-value for value in magnitudes[:0:-1]), *magnitudes))

    @property
    def zero(self) -> int:
        """The code of the value next to 0."""
        return min(range(len(self.numbers)), key=lambda code: abs(self.numbers[code]))

    @property
    def largest(self) -> int:
        """The largest code."""
        return len(self.numbers) - 1

    @property
    def top(self) -> float:
        """The largest absolute value."""
        return max(-self.numbers[0], self.numbers[-1])

    def values(self, codes: Tensor) -> Tensor:
        """Codes of any shape and integer dtype -> float32."""
        return _taken(_on(self._numbers, codes.device), codes.to(torch.int32))

    def nearest(self, x: Tensor) -> Tensor:
        """The codes, uint8, of the values next to float32 `x`."""
        if self._steps is None:
            return torch.bucketize(x.contiguous(), _on(self._middles, x.device), out_int32=True).to(torch.uint8)
        return _taken(_on(self._codes_of_steps, x.device), self._step(x))

    def rounded(self, x: Tensor) -> Tensor:
        """The values next to float32 `x`."""
        if self._steps is None:
            return self.values(self.nearest(x))
        return _taken(_on(self._numbers[self._codes_of_steps], x.device), self._step(x))

    def places(self, x: Tensor) -> Tensor:
        """Where `x` lies among the codes, float32: whole numbers at values, in proportion between them."""
        ladder = _on(self._numbers, x.device)
        below = (torch.bucketize(x.contiguous(), ladder, right=True) - 1).clamp_(0, self.largest - 1)
        low, high = ladder[below], ladder[below + 1]
        return ((x - low) / (high - low)).add_(below).clamp_(0, self.largest)

    def distances(self, place: Tensor) -> Tensor:
        """The distance between the two values around a place of `places`, float32; it is the slope there."""
        return _on(self._numbers, place.device).diff()[place.floor().long().clamp_(0, self.largest - 1)]

    @cached_property
    def _numbers(self) -> Floats:
        return np.array(self.numbers, dtype=np.float32)

    @cached_property
    def _middles(self) -> Floats:
        """The middle between each two values."""
        middles: Floats = (self._numbers[1:] + self._numbers[:-1]) / np.float32(2)
        return middles

    @cached_property
    def _steps(self) -> int | None:
        """Into how many steps of equal length 1 is divided so that all middles lie on steps; None if too many."""
        return next((n for n in (1, 2, 4) if not (self._middles * n % 1).any()), None)

    @cached_property
    def _codes_of_steps(self) -> NDArray[np.uint8]:
        """The code of each step between the lowest and the largest value, both included."""
        steps = self._steps or 1
        positions = np.arange(self.numbers[0] * steps, self.numbers[-1] * steps + 1) / steps
        return np.searchsorted(self._middles, positions).astype(np.uint8)

    def _step(self, x: Tensor) -> Tensor:
        """The number of the step above `x`, int32.  It lies between the same middles as `x`."""
        steps, lowest = self._steps or 1, self.numbers[0]
        above = (x * steps).ceil_().sub_(lowest * steps).clamp_(0, len(self._codes_of_steps) - 1)
        return above.to(torch.int32).clamp_(min=0)  # what is not a number has to be somewhere, too


def _on(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _taken(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


E2M1 = ValueTable.symmetric((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3 = ValueTable.symmetric(tuple(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()))
IQ4 = ValueTable(
    (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
)
VALUE_TABLES: Mapping[str, ValueTable] = {"e2m1": E2M1, "e4m3": E4M3, "iq4": IQ4}
