"""The matrix products that a layer costs, counted in units of N K² multiplications.

On a GPU these products are in float32 and cost more than the forwards, so their number must not grow unnoticed.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmq.algorithms import Options
from llmq.methods import Method
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.report.layer_metrics import layer_report
from llmq.steps.round_group import round_group

N, K = 128, 512
BLOCK = 128 / K  # of a unit: products inside the blocks of 128 columns
LATER = (1 - BLOCK) / 2  # products that update the columns after a block, in GPTQ and in a sweep of descent
FAST = Method(rounding="gptq", alphas=(1.0, 0.5), refinements=("descent",))
REFITTED = Method(rounding="gptq", alphas=(1.0, 0.5), refinements=("descent", "refit"))


def addmm_in_place(total: list[int], left: list[int], right: list[int], **_: object) -> int:
    """Operations of a product that torch counts only out of place, by the shapes of its arguments."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: addmm_in_place}


def statistics() -> InputStats:
    stats, draw = InputStats(K, torch.device("cpu")), torch.Generator().manual_seed(0)
    for sums in (stats, stats.begin_validation()):
        X = torch.randn(2 * K, K, generator=draw)
        sums.update(X, X + 0.2 * torch.randn(2 * K, K, generator=draw) + 0.1)
    return stats


def units(method: Method, scheme: WeightScheme) -> float:
    """Products per layer, in units of N K²."""
    stats = statistics()
    weights = {"q": torch.randn(N, K, generator=torch.Generator().manual_seed(1))}
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        (layer,) = round_group(weights, {"q": scheme}, stats, method, Options())
        layer_report("q", layer.weight, layer.rounding.quantized.dequantize(), layer.rounding, {}, stats, layer.gains)
    return counter.get_total_flops() / (2 * N * K**2)


AFFINE, TWO_LEVEL = WeightScheme(4, 128), WeightScheme.of_blocks("q4_k")
GPTQ = LATER + 1  # and the loss of nearest codes; its own loss costs nothing
STEP = 3  # w C and two triangles, halves of products at larger K
TARGET = STEP + 3  # and the parabola: V H, w C and w DᵀD of validation tokens
DESCENT = 1 + BLOCK + LATER  # the gradient, and the sweep
REFIT = 2  # δ H, and B H
REFIT_TWO_LEVELS = 2 + 2  # δ H and its updates, and B H for d and for dmin
REPORT = 2  # w H, and δ H; GPTQ knows the latter
PRODUCTS = {
    "gptq": (Method(rounding="gptq"), AFFINE, GPTQ + REPORT - 1),
    "fast": (FAST, AFFINE, TARGET + GPTQ + 1 + DESCENT + 1 + REPORT),  # one validation loss of each result
    "refit": (REFITTED, AFFINE, TARGET + GPTQ + 1 + DESCENT + 1 + REFIT + 1 + REPORT),
    "two levels": (REFITTED, TWO_LEVEL, TARGET + GPTQ + 1 + DESCENT + 1 + REFIT_TWO_LEVELS + 1 + REPORT),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_per_layer_do_not_grow(name: str) -> None:
    method, scheme, expected = PRODUCTS[name]
    small = 0.3  # products with (32, 32) corners of H, and the small systems of the refit
    assert expected <= units(method, scheme) <= expected + small
