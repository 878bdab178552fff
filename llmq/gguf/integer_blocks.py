"""Blocks of GGUF that are integer grids: their quantized values can be copied into another format.

Q4_0   symmetric, 4 bits, groups of 32
Q5_0   4 bits with zero points, groups of 32, if the quantized values fit; else 8 bits
Q8_0   symmetric, 8 bits, groups of 32
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.formats.codecs.gguf_blocks import unpack_q4_0, unpack_q5_0, unpack_q8_0
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

GROUP = 32
EXACT = ("Q4_0", "Q5_0", "Q8_0")


def unpacked(kind: str, rows: NDArray[np.uint8]) -> QuantizedTensor:
    """Unpack (N, bytes of a row) of one of the `EXACT` types into the same quantized values."""
    if kind == "Q8_0":
        signed, d = unpack_q8_0(rows)
        return _affine(signed.astype(np.int16) + 128, d, WeightScheme(8, GROUP))
    if kind == "Q4_0":
        codes, d = unpack_q4_0(rows)
        return _affine(codes, d, WeightScheme(4, GROUP))
    codes, d = unpack_q5_0(rows)
    centred = codes.astype(np.int16).reshape(len(rows), -1, GROUP) - 16
    zeros = np.clip(-centred.min(-1), 0, 15)  # (N, G)
    shifted = centred + zeros[..., None]
    if shifted.min() < 0 or shifted.max() > 15:
        return _affine((centred + 128).reshape(len(rows), -1), d, WeightScheme(8, GROUP))
    scheme = WeightScheme(4, GROUP, symmetric=False)
    return _affine(shifted.reshape(len(rows), -1), d, scheme, torch.from_numpy(zeros.astype(np.int16)))


def _affine(
    codes: NDArray[np.integer], d: NDArray[np.float16], scheme: WeightScheme, zeros: Tensor | None = None
) -> QuantizedTensor:
    return QuantizedTensor(torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(d.copy()), zeros, scheme)
