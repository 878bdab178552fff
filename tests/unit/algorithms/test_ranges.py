"""The static scale of inputs, compared with a search over the values themselves."""

import pytest
import torch
from torch import Tensor

from llmq.algorithms.ranges import least_error_scale
from llmq.distributed.ranks import ALONE
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.input_histogram import BINS, InputHistogram
from llmq.numerics.scheme import InputScheme


def inputs(outliers: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=draw)
    x[7, 3] *= outliers
    return x


def error(x: Tensor, energy: Tensor, scale: float, kind: str = "int8") -> float:
    """Of the output, where errors of different columns do not meet: the slow twin."""
    rounded = scale * (x / scale).round().clamp(-128, 127)
    if kind == "fp8":
        rounded = scale * (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return float(((x - rounded).double().square() * energy).sum())


@pytest.mark.parametrize("outliers", [1.0, 60.0])
@pytest.mark.parametrize(("kind", "top"), [("int8", 127.5), ("fp8", 448.0)])
def test_the_scale_is_as_good_as_the_best_of_all(outliers: float, kind: str, top: float) -> None:
    x, energy = inputs(outliers), torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    histogram = InputHistogram(energy)
    for part in x.split(60):
        histogram.update(part)
    scale, largest = least_error_scale(histogram.counts, histogram.limit, torch.float32, kind), float(x.abs().max())
    best = min(error(x, energy, largest / top * part, kind) for part in torch.linspace(0.02, 1, 400).tolist())
    assert error(x, energy, scale, kind) < 1.02 * best
    if outliers > 1:
        assert error(x, energy, scale, kind) < error(x, energy, largest / top, kind)


def test_an_unimportant_column_is_clipped() -> None:
    x, energy = inputs(60.0), torch.ones(32)
    energy[3] = 1e-6
    histogram = InputHistogram(energy)
    histogram.update(x)
    usual = x[:, [column for column in range(32) if column != 3]]
    assert least_error_scale(histogram.counts, histogram.limit, torch.float32, "int8") < float(usual.abs().max()) / 120


def test_the_scale_is_a_value_of_the_dtype() -> None:
    histogram = InputHistogram(torch.ones(32))
    histogram.update(inputs(5.0))
    scale = least_error_scale(histogram.counts, histogram.limit, torch.bfloat16, "int8")
    assert float(torch.tensor(scale).bfloat16()) == scale


def test_without_inputs_the_scale_is_one() -> None:
    histogram = InputHistogram(torch.ones(4))
    histogram.update(torch.zeros(3, 4))
    histogram.update(torch.zeros(0, 4))
    assert least_error_scale(histogram.counts, histogram.limit, torch.float32, "int8") == 1.0


def test_the_order_and_the_division_of_the_inputs_change_no_bit() -> None:
    x, energy = inputs(60.0), torch.rand(32, generator=torch.Generator().manual_seed(1))
    histograms = [InputHistogram(energy) for _ in range(3)]
    for part in x.split(17):
        histograms[0].update(part)
    for part in x.flip(0).split(50):
        histograms[1].update(part)
    histograms[2].update(x)
    histograms[2].sum_over(ALONE)
    assert len({histogram.limit for histogram in histograms}) == 1
    assert all(torch.equal(histograms[0].counts, other.counts) for other in histograms[1:])


def test_values_that_are_not_finite_are_left_out() -> None:
    histogram = InputHistogram(torch.ones(2))
    histogram.update(torch.tensor([[1.0, float("inf")], [float("nan"), -0.5]]))
    assert histogram.limit == 1.0
    assert histogram.counts[0] == 2 * histogram.counts[BINS // 2] == 2 * histogram.counts[-1]


@pytest.mark.parametrize("size", [1e-3, 1e-42])
def test_small_inputs_have_a_scale_in_float16(size: float) -> None:
    histogram = InputHistogram(torch.ones(32))
    x = inputs(1.0) * size
    histogram.update(x)
    scale = least_error_scale(histogram.counts, histogram.limit, torch.float16, "int8")
    assert scale == float(torch.tensor(scale, dtype=torch.float16)) and scale > 0
    if size == 1e-3:
        assert float((rounding_for(InputScheme("int8", "static", scale))(x) - x).norm() / x.norm()) < 0.02
