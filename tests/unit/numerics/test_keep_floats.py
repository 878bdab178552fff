"""Weights that already lie on a grid of floats keep their values."""

import pytest
import torch

from llmq.numerics import affine_grid
from llmq.numerics.keep_floats import keep_floats
from llmq.numerics.scheme import WeightScheme

BRAIN = torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, BRAIN], ids=str)
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_quantized_weights_are_recognized(name: str, stored: torch.dtype) -> None:
    scheme, draw = WeightScheme.of_floats(name), torch.Generator().manual_seed(0)
    weight = torch.randn(20, 96, generator=draw) * 10 ** torch.randn(20, 1, generator=draw)
    weight[3] = 0
    grid = affine_grid.fit_searched(weight, scheme, BRAIN)
    grid.scales[5] *= 2  # no value of the highest octave is used
    restored = grid.quantized(grid.encode(weight)).dequantize().to(stored).float()
    kept = keep_floats(restored, stored, scheme, BRAIN)
    assert kept is not None and torch.equal(kept.dequantize().to(stored).float(), restored)
    assert kept.scales.dtype == (torch.float32 if name == "mxfp4" else BRAIN)
    restored[7, 40] *= 1.01
    assert keep_floats(restored, stored, scheme, BRAIN) is None
    assert keep_floats(weight.to(stored).float(), stored, scheme, BRAIN) is None


def test_nvfp4_is_not_recognized() -> None:
    assert keep_floats(torch.zeros(4, 32), torch.float32, WeightScheme.of_floats("nvfp4"), BRAIN) is None
