"""E2M1, floats of four bits, by their place in ascending order: *codes* 0 to 14 stand for -6 to 6.

    code    0   1   2   3     4   5    6    7   8    9   10   11   12  13  14
    value  -6  -4  -3  -2  -1.5  -1  -.5   0  .5    1  1.5    2    3   4   6

So the next code is the next value, and a code can move by one step as on an integer grid.  The two zeros of E2M1 are
one code.  Values in the middle between two others are rounded down.
"""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*(-value for value in reversed(MAGNITUDES[1:])), *MAGNITUDES)
ZERO = VALUES.index(0.0)
LARGEST = len(VALUES) - 1  # of the codes
MIDDLES = tuple((low + high) / 2 for low, high in zip(VALUES, VALUES[1:], strict=False))


def values(codes: Tensor) -> Tensor:
    """Codes of any shape and integer dtype -> float32."""
    return torch.tensor(VALUES, device=codes.device)[codes.long()]


def nearest(x: Tensor) -> Tensor:
    """The codes, uint8, of the values next to float32 `x`."""
    middles = torch.tensor(MIDDLES, device=x.device)
    return torch.bucketize(x.contiguous(), middles, out_int32=True).to(torch.uint8)


def places(x: Tensor) -> Tensor:
    """Where `x` lies among the codes, float32: whole numbers at values, in proportion between them."""
    ladder = torch.tensor(VALUES, device=x.device)
    below = (torch.bucketize(x.contiguous(), ladder, right=True) - 1).clamp_(0, LARGEST - 1)
    low, high = ladder[below], ladder[below + 1]
    return ((x - low) / (high - low)).add_(below).clamp_(0, LARGEST)


def distances(place: Tensor) -> Tensor:
    """The distance between the two values around a place of `places`, float32; it is the slope there."""
    gaps = torch.tensor(VALUES, device=place.device).diff()
    return gaps[place.floor().long().clamp_(0, LARGEST - 1)]
