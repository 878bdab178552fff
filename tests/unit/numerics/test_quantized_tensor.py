"""`QuantizedTensor`: the weight that every reader of a file computes, compared with loops over single weights."""

import pytest
import torch

from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, WeightScheme


def example(scheme: WeightScheme, N: int = 3, K: int = 32, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(0)
    G = K // scheme.columns_per_group(K)
    codes = torch.randint(0, scheme.levels + 1, (N, K), dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=draw)
    scales = torch.randn(N, G, generator=draw).to(dtype)  # of both signs
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grouping", [16, 32, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_is_scale_times_code_minus_zero(bits: int, grouping: int | str, symmetric: bool) -> None:
    q = example(WeightScheme(bits, grouping, symmetric))  # type: ignore[arg-type]
    per_group = grouping if isinstance(grouping, int) else 32
    for n in range(3):
        for k in range(32):
            zero = 2 ** (bits - 1) if q.zeros is None else int(q.zeros[n, k // per_group])
            expected = float(q.scales[n, k // per_group]) * (int(q.codes[n, k]) - zero)
            # A float16 times a small integer fits the 24 bits of a float32: the product is exact.
            assert float(q.dequantize()[n, k]) == expected


def test_a_weight_is_decoded_in_float32() -> None:
    q = example(WeightScheme(8, 16), dtype=torch.bfloat16)
    again = QuantizedTensor(q.codes, q.scales.float(), None, q.scheme)
    assert q.dequantize().dtype == torch.float32
    assert torch.equal(q.dequantize(), again.dequantize())


def test_a_group_index_selects_the_scale_of_a_column() -> None:
    q = example(WeightScheme(4, 16, symmetric=False))
    assert q.zeros is not None
    index = torch.arange(32, dtype=torch.int32) % 2
    scattered = QuantizedTensor(q.codes, q.scales, q.zeros, q.scheme, index)
    assert scattered.column_groups().tolist() == [0, 1] * 16
    expected = (q.codes[:, 1::2].float() - q.zeros[:, 1:].float()) * q.scales[:, 1:].float()
    assert torch.equal(scattered.dequantize()[:, 1::2], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_a_tensor_in_the_same_memory(symmetric: bool) -> None:
    q = example(WeightScheme(4, 16, symmetric))
    part = q.rows(1, 3)
    assert q.shape == (3, 32) and part.shape == (2, 32)
    assert torch.equal(part.dequantize(), q.dequantize()[1:])
    assert part.codes.data_ptr() == q.codes[1].data_ptr()
