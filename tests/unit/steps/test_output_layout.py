"""Several formats as one layout, which allows only what all of its formats allow."""

import copy

import pytest
import torch

from llmq import formats
from llmq.errors import ConfigError
from llmq.formats.base import Layout
from llmq.numerics.affine_grid import Bounded
from llmq.numerics.scheme import WeightScheme
from llmq.steps import output_layout
from tests.weights import random_weight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [([F16], F16), ([BF16], BF16), ([F32, F16], F16), ([F16, F16], F16), ([BF16, F16], Bounded(BF16, 6.2e-5))],
)
def test_scales_are_rounded_to_what_all_dtypes_hold(dtypes: list[torch.dtype], expected: object) -> None:
    assert output_layout.common_values(dtypes) == expected


def test_every_bounded_bfloat16_is_a_float16() -> None:
    values = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)  # every positive value
    held = values[(values.to(F32) >= 6.19e-5) & (values.to(F32) <= torch.finfo(F16).max)]
    assert len(held) > 3000
    assert held.to(F16).to(F32).equal(held.to(F32))


def test_one_format_is_its_own_layout() -> None:
    assert output_layout.layout_of(["gptq"], BF16) is formats.load("gptq")
    assert output_layout.scale_values(formats.load("compressed-tensors"), BF16) is BF16


@pytest.mark.parametrize(
    ("names", "staged"),
    [
        (("gguf",), "compressed-tensors"),
        (("gguf", "awq"), "awq"),
        (("gptq", "awq"), "gptq"),
        (("gguf:q4_k",), "gguf:q4_k"),
    ],
)
def test_blocks_are_staged_in_the_first_format_of_safetensors(names: tuple[str, ...], staged: str) -> None:
    assert output_layout.staged_format(names) == staged


@pytest.mark.parametrize(
    ("names", "scheme", "words"),
    [
        (("compressed-tensors", "awq"), WeightScheme(8, 32), "awq holds 4 bits only"),
        (("awq", "gptq"), WeightScheme(3, 32), "holds 4 bits only"),
        (("compressed-tensors", "gguf"), WeightScheme(4, 16), "the groups have 16"),
        (("gguf",), WeightScheme(8, 32, symmetric=False), "Q8_0 holds"),
        (("gguf", "gptq"), WeightScheme(4, 32), None),
    ],
)
def test_a_scheme_that_one_format_refuses_is_refused(
    names: tuple[str, ...], scheme: WeightScheme, words: str | None
) -> None:
    refusal = output_layout.layout_of(names, BF16).refusal(scheme, 64, 64)
    assert (words is None) == (refusal is None)
    assert words is None or words in str(refusal)


def test_one_grid_is_required_if_one_format_requires_it() -> None:
    assert output_layout.layout_of(["gptq", "awq"], BF16).one_grid
    assert not output_layout.layout_of(["gptq", "compressed-tensors"], BF16).one_grid
    mixed = {"a": WeightScheme(4, 32), "b": WeightScheme(4, 64)}
    with pytest.raises(ConfigError, match="awq file holds one grid"):
        output_layout.layout_of(["gptq", "awq"], BF16).quantization_config(mixed, [])


def test_staged_scales_are_restored_exactly() -> None:
    layout: Layout = output_layout.layout_of(["compressed-tensors", "gptq"], F32)
    q = random_weight(WeightScheme(4, 32), 8, 64, scale_dtype=F16)
    packed = layout.pack(q)
    assert packed["weight_scale"].dtype is F32
    reader = layout.read_config(layout.quantization_config({"a": q.scheme}, []))
    reading = reader("a")
    assert reading is not None
    back = layout.unpack(packed, reading)
    assert back.scales.dtype is F16 and back.scales.equal(q.scales)


def test_a_copied_layout_has_the_fields_of_its_first_format() -> None:
    layout, first = output_layout.layout_of(["gptq", "awq"], F16), formats.load("gptq")
    again = copy.copy(layout)
    assert (again.suffixes, again.codes, again.config_copy) == (first.suffixes, first.codes, first.config_copy)
    assert again.weight_shape is first.weight_shape


def test_gptq_v2_is_a_separate_format() -> None:
    assert (
        output_layout.single("gptq_v2").quantization_config({"a": WeightScheme(4, 32)}, [])["checkpoint_format"]
        == "gptq_v2"
    )
