"""The definition of y = x Wᵀ + bias with W packed in 2 to 8 bits: NumPy and float64, for truth, not for speed.

The weight is an affine grid: w[n, k] = scales[g, n] * (code[n, k] - zeros[g, n]), g = k // columns_per_group.

**Layout: planes of int16 words over tiles of 128 columns.**  K is padded with code 0 to Kp, a multiple of 128.  A
plane of b bits per column takes 8 b words per tile; bits j b .. j b + b - 1 of word i hold column 8 b j + i of the
tile, so that one shift and one mask of *neighbouring words* give *neighbouring columns*, which is what vector units and
tensor cores need.

    4 bits, 32 words per tile         15    12 11     8 7      4 3      0
                            word  0  | col  96 | col 64 | col 32 | col  0 |
                            word  1  | col  97 | col 65 | col 33 | col  1 |
                             ...
                            word 31  | col 127 | col 95 | col 63 | col 31 |

    2 bits, 16 words per tile         15 14    13 12           3  2     1  0
                            word  0  | col 112 | col 96 | ... | col 16 | col 0 |

    8 bits, 64 words per tile         15               8 7                0
                            word  0  |     col 64       |     col 0        |

    3 bits, 24 words per tile: words 0..15 are a 2-bit plane of the low two bits, words 16..23 a 1-bit plane of bit 2
                                      15        14               1        0
                            word 16  | col 120 | col 112 | ... | col 8 | col 0 |

5, 6 and 7 bits are a 4-bit plane of the low four bits, then planes of 1, of 2, and of 2 and 1 bits.

Every width is dense: a row takes Kp / 16 * bits words.  The layout does not depend on the group size.

N out_features, K in_features, G groups = ceil(K / columns_per_group), T tiles = Kp / 128.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16.packed_weight import PackedWeight

Array = NDArray[Any]

TILE = 128

# bits: the planes of a tile in their order, each as (lowest bit of the code that it holds, bits per column)
PLANES = {
    2: [(0, 2)],
    3: [(0, 2), (2, 1)],
    4: [(0, 4)],
    5: [(0, 4), (4, 1)],
    6: [(0, 4), (4, 2)],
    7: [(0, 4), (4, 2), (6, 1)],
    8: [(0, 8)],
}


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """Codes (N, K) uint8 in [0, 2**bits - 1] -> words (N, Kp / 16 * bits) int16.

    Raises KernelInputError for a width without a layout or a code that does not fit.
    """
    planes = _planes(bits)
    N, K = codes.shape
    if codes.size and codes.max() >= 1 << bits:
        raise KernelInputError(f"a code is {codes.max()}, expected at most {(1 << bits) - 1} for {bits} bits")
    T = -(-K // TILE)
    tiles = np.zeros((N, T, TILE), np.uint16)
    tiles.reshape(N, T * TILE)[:, :K] = codes
    words = []
    for low_bit, width in planes:
        values = tiles >> low_bit & (1 << width) - 1  # (N, T, 128): what this plane holds of each column
        plane = np.zeros((N, T, 8 * width), np.uint16)
        for j in range(16 // width):
            plane |= values[:, :, 8 * width * j : 8 * width * (j + 1)] << j * width
        words.append(plane)
    return np.concatenate(words, axis=2).reshape(N, T * 8 * bits).view(np.int16)


def unpack(words: NDArray[np.int16], bits: int, in_features: int) -> NDArray[np.uint8]:
    """Words (N, Kp / 16 * bits) int16 -> codes (N, K) uint8: the inverse of `pack`, without the padding."""
    N, T = words.shape[0], -(-in_features // TILE)
    tiles = words.view(np.uint16).reshape(N, T, 8 * bits)
    codes = np.zeros((N, T, TILE), np.uint16)
    first = 0  # word of the tile at which the plane starts
    for low_bit, width in _planes(bits):
        plane = tiles[:, :, first : first + 8 * width]
        for j in range(16 // width):
            codes[:, :, 8 * width * j : 8 * width * (j + 1)] |= (plane >> j * width & (1 << width) - 1) << low_bit
        first += 8 * width
    return codes.reshape(N, T * TILE)[:, :in_features].astype(np.uint8)


def dequantize(weight: PackedWeight[Array]) -> NDArray[np.float64]:
    """The weight (N, K) float64, columns in the order in which they are packed."""
    group = np.arange(weight.in_features) // weight.columns_per_group  # (K,)
    codes = unpack(weight.words, weight.bits, weight.in_features).astype(np.float64)  # (N, K)
    middle = float(1 << (weight.bits - 1))
    zero = middle if weight.zeros is None else weight.zeros.astype(np.float64)[group].T  # () or (N, K)
    W: NDArray[np.float64] = weight.scales.astype(np.float64)[group].T * (codes - zero)
    return W


def linear(x: Array, weight: PackedWeight[Array], bias: Array | None) -> NDArray[np.float64]:
    """The product (..., N) float64 of float x (..., K) with the packed weight, plus float bias (N,) if there is one.

    Column c of the packed weight multiplies x[..., column_order[c]]; None is the natural order.  Checkpoints that were
    quantized in activation order need it: their groups are runs of the *sorted* columns.
    """
    ordered = x.astype(np.float64)  # (..., K)
    if weight.column_order is not None:
        ordered = ordered[..., weight.column_order]
    product: NDArray[np.float64] = ordered @ dequantize(weight).T
    return product if bias is None else product + bias.astype(np.float64)


def _planes(bits: int) -> list[tuple[int, int]]:
    if bits not in PLANES:
        raise KernelInputError(f"bits is {bits!r}, expected one of {', '.join(map(str, PLANES))}")
    return PLANES[bits]
