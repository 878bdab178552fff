"""The arrays of a MatMulNBits node, read as the operator's definition says, are the weight."""

import dataclasses

import numpy as np
import pytest
import torch

from llmq.errors import FormatError
from llmq.export.onnx_weights import MatMulNBits, matmul_nbits
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme


def example(scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(0)
    N, G = shape[0], shape[1] // scheme.columns_per_group(shape[1])
    codes = torch.randint(0, scheme.levels + 1, shape, dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=draw)
    scales = torch.randn(N, G, generator=draw).to(dtype)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


def defined(node: MatMulNBits) -> np.ndarray:
    """The weight, number by number."""
    K, N, bits, size = (node.attributes[name] for name in ("K", "N", "bits", "block_size"))
    assert size >= 16 and size & (size - 1) == 0
    mask, weight = (1 << bits) - 1, np.empty((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            block, place = divmod(k, size)
            code = int(node.B[n, block, place * bits // 8]) >> place * bits % 8 & mask
            zero = 1 << (bits - 1)
            if node.zero_points is not None:
                zero = int(node.zero_points[n, block * bits // 8]) >> block * bits % 8 & mask
            weight[n, k] = np.float32(code - zero) * np.float32(node.scales[n, block])
    return weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("scheme", "shape", "block"),
    [
        (WeightScheme(4, 32), (3, 96), 32),
        (WeightScheme(4, 32, symmetric=False), (3, 96), 32),  # three blocks: half a byte of zeros is left
        (WeightScheme(8, 128, symmetric=False), (2, 256), 128),
        (WeightScheme(2, 16, symmetric=False), (2, 80), 16),
        (WeightScheme(4, 512, symmetric=False), (2, 1024), 256),
        (WeightScheme(4, "channel", symmetric=False), (2, 48), 16),
    ],
)
def test_nothing_is_lost(scheme: WeightScheme, shape: tuple[int, int], block: int, dtype: torch.dtype) -> None:
    q = example(scheme, shape, dtype)
    node = matmul_nbits(q)
    assert node.attributes == {"K": shape[1], "N": shape[0], "bits": scheme.bits, "block_size": block}
    assert (node.zero_points is None) == scheme.symmetric
    np.testing.assert_array_equal(defined(node), q.dequantize().numpy())


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (example(WeightScheme(3, 32), (2, 64)), "a grid int3 g32 symmetric"),
        (example(WeightScheme(4, "channel"), (2, 40)), "blocks of 16 columns and more, which 40"),
        (
            dataclasses.replace(
                example(WeightScheme(4, 32), (2, 64)), group_index=torch.arange(64, dtype=torch.int32) % 2
            ),
            "an order of their own",
        ),
    ],
)
def test_what_it_cannot_hold_is_refused(q: QuantizedTensor, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        matmul_nbits(q)
