"""Packing and unpacking of tensors: damaged tensors are refused, variants of other writers are read.

The exact bits are tested in golden/ and properties/.
"""

import dataclasses

import pytest
import torch

from llmq.errors import FormatError
from llmq.formats import awq, compressed_tensors, gptq
from llmq.formats.base import Layout, Reading
from llmq.numerics.scheme import WeightScheme
from tests.unit.formats.examples import ASYMMETRIC, G32, LAYOUTS, example


def reading_of(layout: Layout, scheme: WeightScheme) -> Reading:
    reading = layout.read_config(layout.quantization_config({"a": scheme}, []))("a")
    assert reading is not None
    return reading


# ---- damaged tensors


@pytest.mark.parametrize(
    ("layout", "suffix", "damage", "words"),
    [
        (compressed_tensors.LAYOUT, "weight_packed", None, r"missing, expected int32 \(16, any\); .* weight_scale"),
        (compressed_tensors.LAYOUT, "weight_packed", lambda t: t[:, 1:], "7 words for 64 codes of 4 bits, expected 8"),
        (compressed_tensors.LAYOUT, "weight_packed", lambda t: t[1:], r"int32 \(15, 8\), expected int32 \(16, any\)"),
        (compressed_tensors.LAYOUT, "weight_scale", lambda t: t[:, 1:], r"float16 \(16, 1\), expected .*\(16, 2\)"),
        (compressed_tensors.LAYOUT, "weight_scale", lambda t: t.long(), "weight_scale is int64"),
        (compressed_tensors.LAYOUT, "weight_shape", lambda t: t * torch.tensor([1, 0]), "8 words for 0 codes"),
        (compressed_tensors.LAYOUT, "weight_zero_point", None, "weight_zero_point is missing"),
        (compressed_tensors.LAYOUT, "weight_zero_point", lambda t: t[1:], "1 words for 16 codes"),
        (gptq.LAYOUT, "qweight", lambda t: t.short(), "qweight is int16"),
        (gptq.LAYOUT, "qweight", lambda t: t[:, 1:], r"\(2, 16\), expected .*\(2, 15\)"),
        (gptq.LAYOUT, "qweight", lambda t: t[:0], "no input features"),
        (gptq.LAYOUT, "qweight", lambda t: t[1:], r"int32 \(64\), expected int32 or int64 \(56\)"),
        (gptq.LAYOUT, "qzeros", lambda t: t[:, 1:], r"int32 \(2, 1\), expected int32 \(2, 2\)"),
        (gptq.LAYOUT, "scales", lambda t: t[1:], r"float16 \(1, 16\), expected .*\(2, 16\)"),
        (gptq.LAYOUT, "g_idx", lambda t: t + 1, "1 to 2, expected 0 to 1"),
        (gptq.LAYOUT, "g_idx", lambda t: t[1:], r"int32 \(63\), expected int32 or int64 \(64\)"),
        (awq.LAYOUT, "qweight", lambda t: t[0], r"int32 \(2\), expected int32 \(any, any\)"),
        (awq.LAYOUT, "qzeros", None, "qzeros is missing"),
        (awq.LAYOUT, "scales", lambda t: t.double(), "scales is float64"),
    ],
)
def test_a_damaged_tensor_is_refused(layout: Layout, suffix: str, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    tensors = layout.pack(example(ASYMMETRIC))
    original = tensors.pop(suffix)
    if damage is not None:
        tensors[suffix] = damage(original)
    with pytest.raises(FormatError, match=words):
        layout.unpack(tensors, reading_of(layout, ASYMMETRIC))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_zeros_of_a_file_declared_symmetric_are_kept(layout: Layout) -> None:
    q = example(ASYMMETRIC)
    back = layout.unpack(layout.pack(q), Reading(G32))
    assert back.scheme == ASYMMETRIC
    assert torch.equal(back.dequantize(), q.dequantize())


def test_a_declared_group_index_must_be_in_the_file() -> None:
    tensors = gptq.pack(example())
    del tensors["g_idx"]
    assert gptq.unpack(tensors, Reading(G32, zeros_offset=1)).group_index is None
    with pytest.raises(FormatError, match="g_idx is missing"):
        gptq.unpack(tensors, Reading(G32, zeros_offset=1, needs_group_index=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: {"codes": q.codes + 1}, "a code is 16, expected at most 15"),
        (lambda q: {"codes": q.codes.int()}, "codes is int32"),
        (lambda q: {"zeros": q.zeros + 1}, "1 to 16, expected 0 to 15"),
        (lambda q: {"zeros": q.zeros[:, 1:]}, r"zeros is int16 \(16, 1\)"),
        (lambda q: {"zeros": None}, "no zero points, expected some"),
        (lambda q: {"scales": q.scales * float("nan")}, "not finite"),
        (lambda q: {"scales": q.scales[1:]}, r"\(15, 2\), expected .*\(16, 2\)"),
        (lambda q: {"group_index": torch.zeros(64, dtype=torch.int32)}, "grouped in activation order"),
    ],
)
def test_a_damaged_weight_is_not_written(layout: Layout, change, words: str) -> None:  # type: ignore[no-untyped-def]
    q = example(ASYMMETRIC)
    with pytest.raises(FormatError, match=words):
        layout.pack(dataclasses.replace(q, **change(q)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_shape_of_a_weight_is_read_without_its_codes(layout: Layout) -> None:
    tensors = layout.pack(example())
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
    for suffix in layout.codes:
        del tensors[suffix]
    assert layout.weight_shape(shapes, reading_of(layout, G32), tensors.__getitem__) == (16, 64)


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.complex64), torch.tensor([16, 64, 1])], ids=str)
def test_a_stored_shape_must_be_two_integers(wrong: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"weight_shape is .*, expected int64 or int32"):
        compressed_tensors.LAYOUT.weight_shape({}, reading_of(compressed_tensors.LAYOUT, G32), lambda _: wrong)


# ---- variants of other writers


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_dtype_and_sign(layout: Layout, dtype: torch.dtype) -> None:
    q = example(ASYMMETRIC, dtype=dtype)
    assert bool((q.scales < 0).any())
    back = layout.unpack(layout.pack(q), reading_of(layout, ASYMMETRIC))
    assert back.scales.dtype == dtype
    assert torch.equal(back.scales, q.scales)


def test_a_group_index_is_kept() -> None:
    index = torch.arange(64, dtype=torch.int32) % 2
    q = dataclasses.replace(example(), group_index=index)
    for layout, suffix in ((gptq.LAYOUT, "g_idx"), (compressed_tensors.LAYOUT, "weight_g_idx")):
        tensors = layout.pack(example()) | {suffix: index}
        back = layout.unpack(tensors, dataclasses.replace(reading_of(layout, G32), needs_group_index=True))
        assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("layout", "suffix", "fill"),
    [(gptq.LAYOUT, "g_idx", 0), (compressed_tensors.LAYOUT, "weight_g_idx", -1)],
)
def test_an_unset_index_means_the_natural_order(layout: Layout, suffix: str, fill: int) -> None:
    index = torch.full((64,), fill, dtype=torch.int32)
    assert layout.unpack(layout.pack(example()) | {suffix: index}, reading_of(layout, G32)).group_index is None


def test_compressed_tensors_reads_one_scale_per_weight() -> None:
    q = example(WeightScheme(4, "tensor", symmetric=False), shape=(6, 20))
    one = dataclasses.replace(q, scales=q.scales[:1].expand(6, 1), zeros=torch.full((6, 1), 5, dtype=torch.int16))
    tensors = compressed_tensors.pack(one)
    tensors |= {"weight_scale": one.scales[0], "weight_zero_point": torch.tensor([5 - 8], dtype=torch.int8)}
    back = compressed_tensors.unpack(tensors, Reading(one.scheme))
    assert torch.equal(back.dequantize(), one.dequantize())


def test_compressed_tensors_reads_plain_zeros() -> None:
    q = example(ASYMMETRIC)
    assert q.zeros is not None
    tensors = compressed_tensors.pack(q) | {"weight_zero_point": (q.zeros - 8).to(torch.int8)}
    assert torch.equal(compressed_tensors.unpack(tensors, Reading(ASYMMETRIC)).dequantize(), q.dequantize())


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("word", [0x77777777, 0x88888888 - (1 << 32)])
def test_gptq_reads_symmetric_zeros_of_both_versions(label: str, word: int) -> None:
    q = example()
    tensors = gptq.pack(q) | {"qzeros": torch.full((2, 2), word, dtype=torch.int32)}
    reading = gptq.read_config({"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": label})("a")
    assert reading is not None
    assert torch.equal(gptq.unpack(tensors, reading).dequantize(), q.dequantize())
