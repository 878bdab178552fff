"""One weight as ONNX's MatMulNBits takes it, code for code: `com.microsoft.MatMulNBits` of ONNX Runtime.

    B            uint8 (N, blocks, block_size * bits / 8)   codes along K, the first in the low bits of a byte
    scales       (N, blocks)                                float32 or float16
    zero_points  uint8 (N, ceil(blocks * bits / 8))         along the blocks; absent where all are in the middle

    y = x Wᵀ,   W[n, k] = scales[n, b] * (B[n, k] - zero_points[n, b]),   b = k // block_size

A block is a power of two from 16 to 256.  A group that is longer is several blocks with its scale, so the weight is the
same to the bit.  This makes the arrays of one node; graphs of whole models are the business of ONNX's own tools.

Source: github.com/microsoft/onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmq.errors import FormatError
from llmq.numerics.quantized_tensor import QuantizedTensor

BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class MatMulNBits:
    """The attributes of a node, and its inputs beside x; `zero_points` is None where it is to be left out."""

    attributes: dict[str, int]
    B: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


def matmul_nbits(q: QuantizedTensor) -> MatMulNBits:
    """The node of a weight; raises FormatError for one that the operator cannot hold exactly.

    Scales stay float16 where they are; bfloat16 becomes float32, as NumPy has no such type.
    """
    N, K = q.shape
    bits = q.scheme.bits
    if bits not in BITS or q.superblocks is not None or q.group_index is not None:
        what = f"a grid {q.scheme}" if q.group_index is None else "columns in an order of their own"
        raise FormatError(
            f"MatMulNBits has no place for {what}; it holds {', '.join(map(str, BITS))} bits in plain groups"
        )
    group = q.scheme.columns_per_group(K)
    size = next((block for block in BLOCKS if group % block == 0), None)
    if size is None:
        raise FormatError(
            f"MatMulNBits has blocks of {BLOCKS[-1]} columns and more, which {group} in a group do not fill"
        )
    repeat = group // size
    scales = q.scales if q.scales.dtype == torch.float16 else q.scales.to(torch.float32)
    zeros = None if q.zeros is None else q.zeros.to(torch.uint8).cpu().numpy().repeat(repeat, axis=1)
    return MatMulNBits(
        attributes={"K": K, "N": N, "bits": bits, "block_size": size},
        B=_packed(q.codes.cpu().numpy(), bits).reshape(N, K // size, size * bits // 8),
        scales=scales.cpu().numpy().repeat(repeat, axis=1),
        zero_points=None if zeros is None else _packed(zeros, bits),
    )


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, L) -> (N, ceil(L * bits / 8)), the first code of a byte lowest"""
    per_byte = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte)))
    places = padded.reshape(len(codes), -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(places, axis=2).astype(np.uint8)
    return packed
