"""Rounding to codes in Triton, as torch rounds."""

import triton
import triton.language as tl


@triton.jit
def nearest_code(value, levels):
    """round(value), ties to even, clamped to [0, levels]; levels <= 255.

    Adding 2**23 to a float32 in [0, 255] leaves no fraction and rounds to nearest even.
    """
    magic = 8388608.0  # 2**23
    return (tl.minimum(tl.maximum(value, 0.0), levels) + magic) - magic
