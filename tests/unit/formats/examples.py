"""Weights and layouts of the tests of packing formats."""

import torch

from llmq.formats import awq, compressed_tensors, gptq
from llmq.formats.base import Layout
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

LAYOUTS: tuple[Layout, ...] = (awq.LAYOUT, compressed_tensors.LAYOUT, gptq.LAYOUT)
G32, ASYMMETRIC = WeightScheme(4, 32), WeightScheme(4, 32, symmetric=False)


def example(
    scheme: WeightScheme = G32, shape: tuple[int, int] = (16, 64), dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Random codes and zeros, scales of both signs, always the same."""
    draw = torch.Generator().manual_seed(0)
    N, G = shape[0], shape[1] // scheme.columns_per_group(shape[1])
    codes = torch.randint(0, scheme.levels + 1, shape, dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=draw)
    scales = torch.randn(N, G, generator=draw).to(dtype)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)
