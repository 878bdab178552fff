"""Packing is lossless for all bits, shapes and grids; the slow reference is one big Python integer."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq import formats
from llmq.formats.base import Layout, Reading
from llmq.formats.codecs import bit_packing
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, WeightScheme

LAYOUTS = tuple(formats.load(name) for name in formats.names() if name != "gguf")
quick = settings(max_examples=60)


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits_per_code = draw(st.sampled_from(BITS))
    length = draw(st.integers(1, 140))
    row = st.lists(st.integers(0, (1 << bits_per_code) - 1), min_size=length, max_size=length)
    return bits_per_code, draw(st.lists(row, min_size=1, max_size=3))


@st.composite
def quantized(draw: st.DrawFn, layout: Layout) -> QuantizedTensor:
    """A random tensor that the layout can hold."""
    group_size = draw(st.sampled_from((16, 32, 64, "channel", "tensor")))
    scheme = WeightScheme(draw(st.sampled_from(BITS)), group_size, draw(st.booleans()))  # type: ignore[arg-type]
    per_group = group_size if isinstance(group_size, int) else 1
    N, K = draw(st.integers(1, 40)), per_group * draw(st.integers(1, 80 // min(per_group, 40)))
    if layout.refusal(scheme, N, K) is not None:
        scheme = dataclasses.replace(scheme, bits=4)
        N, K = 8 * -(-N // 8), 8 * -(-K // 8)
    if layout.refusal(scheme, N, K) is not None:
        scheme, K = dataclasses.replace(scheme, group_size=32), 32 * -(-K // 32)
    G = K // scheme.columns_per_group(K)
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    codes = torch.randint(0, scheme.levels + 1, (N, K), dtype=torch.uint8, generator=random)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=random)
    scales = torch.randn(1 if scheme.group_size == "tensor" else N, G, generator=random).expand(N, G)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    dtype = draw(st.sampled_from(dtypes[:2] if layout.name == "mlx" else dtypes))  # see its header
    return QuantizedTensor(codes, scales.to(dtype), None if scheme.symmetric else zeros, scheme)


def stream_words(codes: list[int], bits_per_code: int) -> list[int]:
    """The codes as digits of one number, cut into words."""
    number = sum(code << (i * bits_per_code) for i, code in enumerate(codes))
    count = -(-len(codes) * bits_per_code // 32)
    return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)]


def unsigned(words: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


@quick
@given(code_rows())
def test_words_are_the_stream_of_bits(example: tuple[int, list[list[int]]]) -> None:
    bits_per_code, rows = example
    words = bit_packing.pack(torch.tensor(rows, dtype=torch.uint8), bits_per_code)
    assert words.dtype == torch.int32
    assert unsigned(words) == [stream_words(row, bits_per_code) for row in rows]


@quick
@given(code_rows(), st.sampled_from((0, 1)))
def test_unpacking_is_the_inverse_along_either_dimension(example: tuple[int, list[list[int]]], dim: int) -> None:
    bits_per_code, rows = example
    codes = torch.tensor(rows, dtype=torch.uint8)
    codes = codes if dim == 1 else codes.T
    words = bit_packing.pack(codes, bits_per_code, dim)
    back = bit_packing.unpack(words, bits_per_code, codes.shape[dim], dim)
    assert words.is_contiguous() and back.is_contiguous()
    assert torch.equal(back, codes)


@quick
@given(code_rows())
def test_padded_words_hold_whole_codes(example: tuple[int, list[list[int]]]) -> None:
    bits_per_code, rows = example
    per_word = 32 // bits_per_code
    length = len(rows[0])
    cut = [[row[i : i + per_word] for i in range(0, length, per_word)] for row in rows]
    words = [[stream_words(chunk, bits_per_code)[0] for chunk in row] for row in cut]
    as_tensor = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert as_tensor.shape[1] == bit_packing.padded_words_for(length, bits_per_code)
    assert bit_packing.unpack_padded(as_tensor, bits_per_code, length).tolist() == rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@given(data=st.data())
@quick
def test_unpacking_is_the_inverse_of_packing(layout: Layout, data: st.DataObject) -> None:
    q = data.draw(quantized(layout))
    scheme = dataclasses.replace(q.scheme, group_size="channel") if q.scheme.group_size == "tensor" else q.scheme
    reading = layout.read_config(layout.quantization_config({"a": q.scheme}, []))("a")
    assert reading is not None
    tensors = layout.pack(q)
    back = layout.unpack(tensors, dataclasses.replace(reading, scheme=scheme))
    assert set(tensors) <= {*layout.suffixes, *(["weight"] if reading.in_place else [])}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert back.scheme == scheme and back.group_index is None
    assert back.codes.dtype == torch.uint8
    assert back.scales.dtype == q.scales.dtype or (layout.name == "mlx" and not q.scheme.symmetric)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales.double(), q.scales.double())
    assert (back.zeros is None) == (q.zeros is None)
    if back.zeros is not None and q.zeros is not None:
        assert back.zeros.dtype == torch.int16
        assert torch.equal(back.zeros, q.zeros)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@given(data=st.data())
@quick
def test_the_configuration_is_enough_to_read_a_weight(layout: Layout, data: st.DataObject) -> None:
    q = data.draw(quantized(layout))
    reading = layout.read_config(layout.quantization_config({"a": q.scheme}, ["b"]))("a")
    assert reading is not None
    assert torch.equal(layout.unpack(layout.pack(q), reading).dequantize(), q.dequantize())


@quick
@given(data=st.data())
def test_compressed_tensors_reads_padded_and_dense_alike(data: st.DataObject) -> None:
    layout = formats.load("compressed-tensors")
    N, K = data.draw(st.sampled_from((96, 112, 128))), data.draw(st.sampled_from((96, 128, 176)))  # widths differ here
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    scheme = WeightScheme(3, 16, symmetric=False)
    codes = torch.randint(0, 8, (N, K), dtype=torch.uint8, generator=random)
    zeros = torch.randint(0, 8, (N, K // 16), dtype=torch.int16, generator=random)
    q = QuantizedTensor(codes, torch.randn(N, K // 16, generator=random), zeros, scheme)
    padded = {"weight_packed": _padded(codes), "weight_zero_point": _padded(zeros.to(torch.uint8).T).T}
    back = layout.unpack(layout.pack(q) | padded, Reading(scheme))
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.zeros, zeros)  # type: ignore[arg-type]


def _padded(codes: Tensor) -> Tensor:
    """uint8 (rows, L) of 3 bits -> int32 (rows, ceil(L / 10)), ten per word"""
    whole = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % 10))
    shifts = torch.arange(0, 30, 3, dtype=torch.int32)
    return (whole.reshape(codes.shape[0], -1, 10) << shifts).sum(-1, dtype=torch.int32)
