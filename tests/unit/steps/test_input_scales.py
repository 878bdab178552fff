"""Static scales of the inputs of a block's layers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmq.algorithms import Options
from llmq.algorithms.ranges import calibrated_scale
from llmq.model.analyse.input_groups import InputGroup
from llmq.numerics.fake_quantize import global_scale
from llmq.numerics.input_histogram import InputHistogram
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme
from llmq.steps import input_scales


@pytest.mark.parametrize("largest", [0.0, 1.5])
def test_the_global_scale_of_nvfp4_holds_the_largest_input(largest: float) -> None:
    histogram = InputHistogram(torch.ones(4))
    histogram.update(torch.tensor([[largest, -largest, largest / 2, 0.0]]))
    scale = calibrated_scale(InputScheme("nvfp4", "local"), histogram, torch.bfloat16)
    assert scale == pytest.approx(448 * 6 / largest if largest else 1.0, rel=2e-4)
    assert scale * largest <= 448 * 6


def test_the_global_scale_of_tiny_inputs_is_a_float32() -> None:
    assert global_scale(1e-37) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("size", [0.0, 2.0])
def test_inputs_that_are_all_zero_are_noted(size: float) -> None:
    plans = {
        name: LayerPlan(name, 8, 4, Scheme(WeightScheme(8, "channel"), InputScheme(kind, "static")))
        for name, kind in (("q", "int8"), ("k", "fp8"))
    }
    applied: dict[str, Any] = {}
    block: Any = SimpleNamespace(
        linears=plans, inputs=SimpleNamespace(awaits=plans.__contains__, schemes={}), quantize_inputs=applied.update
    )
    run: Any = SimpleNamespace(plans=plans, options=Options(scale_dtype=torch.float32))
    histogram = InputHistogram(torch.ones(4))
    histogram.update(torch.tensor([[size, -size, size / 2, 0.0]]))
    stats: Any = SimpleNamespace(histogram=histogram)
    notes = input_scales.measure(run, block, InputGroup(("q", "k"), 4), stats)
    assert [applied[name].scale * top for name, top in (("q", 127), ("k", 448))] == pytest.approx(
        [size, size] if size else [127, 448], rel=0.02
    )
    assert len(notes) == (0 if size else 2) and all("inputs are 0 in all calibration tokens" in note for note in notes)
