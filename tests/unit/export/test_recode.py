"""A weight for another format: the same values, or a reason."""

import pytest
import torch

from llmq import formats
from llmq.export.recode import Recoded, recode
from llmq.numerics.scheme import WeightScheme
from tests.unit.formats.examples import example


@pytest.mark.parametrize(
    ("bits", "to", "wide"),
    [(2, "awq", 4), (3, "gptq", 4), (5, "gptq", 8), (7, "mlx", 8), (6, "mlx", 6), (7, "compressed-tensors", 7)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_that_a_format_does_not_have_fit_into_more(bits: int, to: str, wide: int, symmetric: bool) -> None:
    q = example(WeightScheme(bits, 32, symmetric), (16, 64))
    layout = formats.load(to)
    recoded = recode(q, layout, torch.float16)
    assert isinstance(recoded, Recoded)
    assert (recoded.error, recoded.quantized.scheme.bits) == (None, wide)
    assert torch.equal(recoded.quantized.dequantize(), q.dequantize())


def test_five_bits_do_not_fit_into_four() -> None:
    assert recode(example(WeightScheme(5, 32), (16, 64)), formats.load("awq"), torch.float16) == (
        "awq holds 4 bits only, not 5; compressed-tensors holds 2 to 8"
    )
