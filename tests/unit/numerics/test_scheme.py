"""Schemes of weights and inputs: their text, and errors for schemes that do not exist."""

from typing import Any

import pytest

import llmq
from llmq.errors import ConfigError
from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme


def test_schemes_are_public() -> None:
    assert (llmq.Scheme, llmq.WeightScheme, llmq.InputScheme) == (Scheme, WeightScheme, InputScheme)
    assert llmq.QuantConfig(scheme=llmq.WeightScheme(8, 32)).scheme.bits == 8


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(), "float"),
        (Scheme(WeightScheme(4, 128)), "int4 g128 symmetric"),
        (Scheme(WeightScheme(8, "channel"), InputScheme()), "int8 channel symmetric, inputs int8 dynamic per token"),
        (Scheme(None, InputScheme("fp8", "static")), "float, inputs fp8 static per tensor"),
        (Scheme(None, InputScheme("nvfp4", "local")), "float, inputs nvfp4 dynamic per 16"),
    ],
)
def test_a_scheme_is_described_in_words(scheme: Scheme, text: str) -> None:
    assert str(scheme) == text


@pytest.mark.parametrize(
    "fields",
    [("int4", "dynamic"), ("int8", "per token"), (8, "dynamic"), ("int8", None), ("nvfp4", "static"), ("fp8", "local")],
)
def test_an_unknown_input_scheme_is_refused(fields: Any) -> None:
    with pytest.raises(ConfigError, match=r"of an input scheme is .*, expected one of") as caught:
        InputScheme(*fields)
    assert "InputScheme('int8', 'dynamic')" in caught.value.hint


@pytest.mark.parametrize(
    "fields", [(4, None), (WeightScheme(), "int8"), (InputScheme(), WeightScheme())], ids=["bits", "text", "swapped"]
)
def test_a_scheme_of_other_types_is_refused(fields: Any) -> None:
    with pytest.raises(ConfigError, match="of a scheme is .*, expected (Weight|Input)Scheme or None"):
        Scheme(*fields)


@pytest.mark.parametrize(
    "fields", [("int8", "dynamic", 0.5), ("int8", "static", 0.0), ("int8", "static", float("inf"))]
)
def test_a_scale_is_positive_and_static(fields: Any) -> None:
    with pytest.raises(ConfigError, match="scale of an input scheme"):
        InputScheme(*fields)
