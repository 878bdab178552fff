"""The two stages that round to nearest: without statistics, and with ranges clipped for the inputs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq import algorithms
from llmq.algorithms import Options, Rounding, clip, output_error, rtn
from llmq.methods import METHODS
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme

G16 = WeightScheme(4, 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier_stats(K: int = 32) -> InputStats:
    """Statistics of independent inputs with a few outlier channels."""
    stats = InputStats(K, torch.device("cpu"))
    X = random(256, K, seed=1)
    X[:, ::8] *= 20
    stats.update(X)
    return stats


def nearest_by_hand(weight: Tensor, rounding: Rounding, scheme: WeightScheme) -> np.ndarray:
    """(N, K) codes: for each weight the code with the closest decoded value, by trying all codes."""
    q, per_group = rounding.quantized, scheme.columns_per_group(weight.shape[1])
    codes = np.zeros(weight.shape, int)
    for n, k in np.ndindex(*weight.shape):
        zero = scheme.middle if q.zeros is None else int(q.zeros[n, k // per_group])
        points = float(q.scales[n, k // per_group]) * (np.arange(2**scheme.bits) - zero)
        codes[n, k] = np.abs(points - float(weight[n, k])).argmin()
    return codes


@pytest.mark.parametrize("scales", ["searched", "minmax"])
@pytest.mark.parametrize(
    "scheme", [WeightScheme(4, 16), WeightScheme(3, "channel", symmetric=False), WeightScheme(2, "tensor")], ids=str
)
def test_rtn_takes_the_nearest_value_of_its_grid(scales: str, scheme: WeightScheme) -> None:
    weight = random(4, 32)
    rounding = rtn.round_weight(weight, None, scheme, Options(scales=scales))
    np.testing.assert_array_equal(rounding.quantized.codes.numpy(), nearest_by_hand(weight, rounding, scheme))
    assert rounding.damping is None and rounding.notes == ()


def test_rtn_uses_the_requested_grid() -> None:
    weight = random(4, 32)
    for scales, fit in (("searched", affine_grid.fit_searched), ("minmax", affine_grid.fit_minmax)):
        rounding = rtn.round_weight(weight, outlier_stats(), G16, Options(torch.float16, scales=scales))
        assert torch.equal(rounding.quantized.scales, fit(weight, G16, torch.float16).scales)


def test_clip_chooses_its_grid_for_the_inputs() -> None:
    weight, stats = random(4, 32), outlier_stats()
    clipped = clip.round_weight(weight, stats, G16, Options())
    np.testing.assert_array_equal(clipped.quantized.codes.numpy(), nearest_by_hand(weight, clipped, G16))
    blind = rtn.round_weight(weight, stats, G16, Options())
    errors = [
        float(output_error(weight, rounding.quantized.dequantize(), torch.diag(stats.mean_square)).sum())
        for rounding in (clipped, blind)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("case", ["no statistics", "min-max requested", "zero inputs"])
def test_clip_without_usable_statistics_is_rtn(case: str) -> None:
    weight = random(4, 32)
    stats = {"no statistics": None, "min-max requested": outlier_stats()}.get(case, InputStats(32, torch.device("cpu")))
    options = Options(scales="minmax" if case == "min-max requested" else "searched")
    clipped, plain = clip.round_weight(weight, stats, G16, options), rtn.round_weight(weight, None, G16, options)
    assert torch.equal(clipped.quantized.dequantize(), plain.quantized.dequantize())


def test_a_channel_that_was_zero_in_calibration_still_counts() -> None:
    """Where a whole group was zero, its scales are chosen as if all its channels had equal inputs."""
    weight, stats = random(4, 32), outlier_stats()
    stats._gram[:16] = stats._gram[:, :16] = 0
    clipped = clip.round_weight(weight, stats, G16, Options())
    blind = rtn.round_weight(weight, None, G16, Options())
    assert torch.equal(clipped.quantized.scales[:, 0], blind.quantized.scales[:, 0])


def test_the_output_error_is_the_mean_squared_change() -> None:
    weight, rounded, X = random(3, 8), random(3, 8, seed=1), random(40, 8, seed=2)
    change = X.double() @ (weight - rounded).double().T  # (T, N)
    error = output_error(weight, rounded, X.T @ X / 40)
    torch.testing.assert_close(error.double(), change.square().mean(0), rtol=1e-5, atol=0)  # 64 float32 products


def test_every_stage_of_a_method_has_a_file() -> None:
    for method in METHODS.values():
        assert callable(algorithms.rounding(method.rounding).round_weight)
        for name in method.transforms:
            assert callable(algorithms.transform(name).basis)
        for name in method.refinements:
            assert callable(algorithms.refinement(name).refine)


@pytest.mark.parametrize("name", sorted({method.rounding for method in METHODS.values()}))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_rounding_stage_gives_dtypes_of_the_layouts(name: str, dtype: torch.dtype) -> None:
    scheme = WeightScheme(4, 16, symmetric=False)
    rounding = algorithms.rounding(name).round_weight(random(8, 32), outlier_stats(), scheme, Options(dtype))
    q = rounding.quantized
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (8, 32) and int(q.codes.max()) <= 15
    assert q.scales.dtype == dtype and q.scales.shape == (8, 2)
    assert q.zeros is not None and q.zeros.dtype == torch.int16 and q.zeros.shape == (8, 2)
    part = rounding.rows(2, 5)
    assert torch.equal(part.quantized.dequantize(), q.dequantize()[2:5]) and part.notes == rounding.notes
