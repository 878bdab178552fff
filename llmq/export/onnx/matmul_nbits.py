"""One weight as ONNX Runtime's operator `com.microsoft.MatMulNBits` takes it, code for code.

    B            uint8 (N, blocks, block_size * bits / 8)   codes along K, the first in the low bits of a byte
    scales       float32 (N, blocks)
    zero_points  uint8 (N, ceil(blocks * bits / 8))         along the blocks; absent if all are 2**(bits - 1)

    y = x Wᵀ,   W[n, k] = scales[n, b] * (B[n, k] - zero_points[n, b]),   b = k // block_size

A block is a power of two from 16 to 256. A longer group becomes several blocks with the same scale, and a row of one
group whose length is not a multiple of 16 is padded. Codes of 3 bits are stored in 4, with an offset of 4 in codes and
zero points. So the weight is the same, bit for bit.

Source: github.com/microsoft/onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError
from llmq.export.recode import widened_scheme
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Grid:
    """What all rows of one node share: its attributes, and whether it has zero points."""

    K: int
    bits: int
    block_size: int
    has_zeros: bool


@dataclass(frozen=True)
class NodeWeight:
    """The weight of one node; `zero_points` is None in a symmetric grid."""

    grid: Grid
    B: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    def joined(self, below: "NodeWeight") -> "NodeWeight":
        """The rows of this weight, and those of another one with the same grid."""
        zeros = None
        if self.zero_points is not None and below.zero_points is not None:
            zeros = np.concatenate([self.zero_points, below.zero_points])
        B, scales = np.concatenate([self.B, below.B]), np.concatenate([self.scales, below.scales])
        return NodeWeight(self.grid, B, scales, zeros)

    def rows(self, start: int, stop: int) -> "NodeWeight":
        """Rows `start` to `stop` of the weight."""
        zeros = None if self.zero_points is None else self.zero_points[start:stop]
        return NodeWeight(self.grid, self.B[start:stop], self.scales[start:stop], zeros)

    def dequantize(self) -> NDArray[np.float32]:
        """(N, K) float32, computed from the arrays as the operator does."""
        bits, blocks = self.grid.bits, self.scales.shape[1]
        codes = _unpacked(self.B.reshape(len(self.B), -1), bits).reshape(len(self.B), blocks, -1).astype(np.float32)
        if self.zero_points is None:
            codes -= np.float32(2 ** (bits - 1))
        else:
            codes -= _unpacked(self.zero_points, bits)[:, :blocks, None].astype(np.float32)
        weight: NDArray[np.float32] = codes * self.scales[:, :, None]
        return weight.reshape(len(weight), -1)[:, : self.grid.K]


def refusal(scheme: WeightScheme) -> str | None:
    """Why the operator cannot hold such a grid, or None."""
    bits = (widened_scheme(scheme) or scheme).bits
    return None if bits in BITS else f"MatMulNBits holds 2, 3, 4 and 8 bits, found {scheme.bits}"


def node_weight(q: QuantizedTensor) -> NodeWeight:
    """The arrays of a weight without a group index, whose grid `refusal` does not refuse.

    Raises FormatError for zero points outside the grid, which some files of other tools have.
    """
    bits, shift = q.scheme.bits, 0
    if bits not in BITS and (wide := widened_scheme(q.scheme)) is not None:
        bits, shift = wide.bits, wide.middle - q.scheme.middle
    N, K = q.shape
    group = q.scheme.columns_per_group(K)
    size = next((block for block in BLOCKS if group % block == 0), BLOCKS[-1])
    blocks = -(-K // size)
    repeat = blocks // q.scales.shape[1]
    codes = np.zeros((N, blocks * size), np.uint8)
    codes[:, :K] = q.codes.cpu().numpy() + np.uint8(shift)
    zeros = None
    if q.zeros is not None:
        if int(q.zeros.min()) + shift < 0 or int(q.zeros.max()) + shift >= 2**bits:
            raise FormatError(
                f"MatMulNBits holds zero points from 0 to {2**bits - 1}, found {int(q.zeros.min())} to "
                f"{int(q.zeros.max())}",
                hint="use another format, or quantize the original model symmetrically",
            )
        zeros = _packed((q.zeros + shift).cpu().numpy().astype(np.uint8).repeat(repeat, axis=1), bits)
    return NodeWeight(
        Grid(K, bits, size, zeros is not None),
        B=_packed(codes, bits).reshape(N, blocks, size * bits // 8),
        scales=q.scales.float().cpu().numpy().repeat(repeat, axis=1),
        zero_points=zeros,
    )


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, L) -> (N, ceil(L * bits / 8)), the first code of a byte in its low bits."""
    per_byte = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte)))
    places = padded.reshape(len(codes), -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(places, axis=2).astype(np.uint8)
    return packed


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, bytes) -> (N, bytes * 8 / bits), the inverse of `_packed` except for its padding."""
    codes = packed[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)
