"""The arrays of MatMulNBits: the same weight as in llmq, bit for bit, and what the operator cannot hold."""

import numpy as np
import pytest
import torch

from llmq.export.onnx.matmul_nbits import node_weight, refusal
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GroupSize, WeightScheme

N = 6


def weight(scheme: WeightScheme, K: int) -> QuantizedTensor:
    """Random codes, scales and zero points on a grid."""
    generator = torch.Generator().manual_seed(0)
    G = K // scheme.columns_per_group(K)
    codes = torch.randint(scheme.levels + 1, (N, K), generator=generator).to(torch.uint8)
    scales = torch.randn(N, G, generator=generator).to(torch.bfloat16)
    zeros = torch.randint(scheme.levels + 1, (N, G), generator=generator).to(torch.int16)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "K", "block"),
    [
        (2, 16, 48, 16),
        (3, 32, 96, 32),  # stored in 4 bits
        (4, 128, 256, 128),
        (8, 1024, 1024, 256),  # four blocks with one scale
        (4, "channel", 96, 32),
        (4, "channel", 40, 16),  # the last block is padded
    ],
)
def test_arrays_hold_the_same_weight(bits: int, group: GroupSize, K: int, block: int, symmetric: bool) -> None:
    q = weight(WeightScheme(bits, group, symmetric), K)
    made = node_weight(q)
    assert refusal(q.scheme) is None
    assert made.grid.block_size == block and made.grid.has_zeros is not symmetric
    assert made.B.shape == (N, -(-K // block), block * made.grid.bits // 8)
    assert np.array_equal(made.dequantize(), q.dequantize().numpy())
    assert np.array_equal(made.joined(made).rows(N, 2 * N).dequantize(), q.dequantize().numpy())


def test_the_first_code_of_a_byte_is_in_its_low_bits() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([1, 2, 3])
    scheme = WeightScheme(4, 16)
    made = node_weight(QuantizedTensor(codes, torch.ones(1, 1), None, scheme))
    assert made.B[0, 0, :2].tolist() == [0x21, 0x03]
