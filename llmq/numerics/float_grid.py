"""Grids of small floats with a scale per group: NVFP4 and MXFP4 (E2M1, four bits), FP8 (E4M3).

    w  ≈  scale * value        value in ±{0, .5, 1, 1.5, 2, 3, 4, 6}, or one of E4M3

    nvfp4   16 columns   scale = E4M3 / global scale, one float32 for the whole weight
    mxfp4   32 columns   scale = a power of two (E8M0)
    fp8     a row        scale = a number of the dtype of the model

Codes (quantized values) are places in ascending order (`llmq_kernels/value_tables.py`), scales are the real numbers.
The min-max scale puts the largest weight of a group on the largest value, 6, or in mxfp4 between 3.5 and 7: above 7
the error of the largest weight is more than that of rounding to the values around 6 and 8 would be.  `fit` tries the
scales around it that the file can hold, and takes the one of least error sum_j importance_j * (w_j - ŵ_j)².  That
includes scales that put the largest weight on 4, where values are denser ("four over six", Cook et al. 2025,
arXiv:2512.02010).  In mxfp4 it tries no smaller scale, although the error of the group alone is often least there:
columns that compensate for others grow, and GPTQ's result is better without (eval/LOG.md).  fp8 is always min-max: its
values are dense in proportion.

The global scale is a power of two, so that scales are exact in float32.  It puts the largest scale of all weights that
share an input near, but not at, the top of E4M3: engines that fuse these weights require one global scale, and later
stages may raise scales.

Source: OCP Microscaling Formats 1.0; github.com/vllm-project/compressed-tensors, compressors/nvfp4.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from llmq.numerics.scheme import WeightScheme
from llmq_kernels.value_tables import E2M1

TOP = E2M1.top
E4M3 = torch.float8_e4m3fn
LARGEST_E4M3, SMALLEST_E4M3 = 448.0, 2.0**-6  # the smallest with all digits
HEADROOM = 2.0  # of the largest scale, for stages that raise it
LOWEST_EXPONENT, HIGHEST_EXPONENT = -126, 127  # of E8M0 as normal float32
LARGEST_GLOBAL = 120  # exponent, with which the smallest scale is a normal float32
STEPS_E4M3 = (0, *(step for size in range(1, 7) for step in (-size, size)))  # from the min-max scale; 8 are an octave
STEPS_E8M0 = (0, 1)
ELEMENTS_AT_ONCE = {"cpu": 1 << 18}  # fits into its cache
ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 24


def global_scale(weights: Iterable[Tensor]) -> float:
    """The global scale of nvfp4 for weights (N, K) that engines fuse."""
    largest = max(float(weight.abs().amax()) for weight in weights)
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.floor(math.log2(LARGEST_E4M3 / HEADROOM * TOP) - math.log2(largest))
    return 2.0 ** min(exponent, LARGEST_GLOBAL)


def fit(
    weight: Tensor, scheme: WeightScheme, shared: float, importance: Tensor | None = None, *, searched: bool = True
) -> Tensor:
    """Scales (N, G) float32 for `weight` (N, K) float32, of least error or, if not `searched`, min-max.

    shared      the global scale; 1 in mxfp4
    importance  (K,) float32, the cost of an error in a column; 1 where not given
    """
    N, K = weight.shape
    width = scheme.columns_per_group(K)
    cost = None if importance is None else importance.to(torch.float32).reshape(-1, width)  # (G, g)
    at_once = ELEMENTS_AT_ONCE.get(weight.device.type, ELEMENTS_AT_ONCE_ELSEWHERE)
    parts = weight.reshape(N, K // width, width).split(max(1, at_once // K))
    return torch.cat([_fit(part, scheme, shared, cost, searched=searched) for part in parts])


def storable(scales: Tensor, scheme: WeightScheme, shared: Tensor | float) -> Tensor:
    """The nearest scales that the file can hold, float32; `shared` is the global scale (N, 1), or 1 in mxfp4."""
    if scheme.floats == "nvfp4":
        return _of_e4m3((scales * shared).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(E4M3), shared)
    mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1)
    return _powers(exponent - (mantissa <= 0.75).to(exponent.dtype))


def _fit(groups: Tensor, scheme: WeightScheme, shared: float, cost: Tensor | None, *, searched: bool) -> Tensor:
    """Scales (R, G) of groups (R, G, g)."""
    candidates = _candidates(groups.abs().amax(-1), scheme, shared)
    if not searched:
        return candidates[0]
    best = candidates[0]
    least = _error(groups, best, cost)
    for scales in candidates[1:]:
        error = _error(groups, scales, cost)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return best


def _candidates(largest: Tensor, scheme: WeightScheme, shared: float) -> list[Tensor]:
    """Scales (R, G) around the min-max ones, which are first, for the largest weights (R, G) of groups."""
    if scheme.floats == "nvfp4":
        first = (largest * (shared / TOP)).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(E4M3).view(torch.uint8)
        lowest, highest = (
            int(torch.tensor(limit, dtype=E4M3).view(torch.uint8)) for limit in (SMALLEST_E4M3, LARGEST_E4M3)
        )
        codes = ((first.to(torch.int16) + step).clamp_(lowest, highest) for step in STEPS_E4M3)
        return [_of_e4m3(code.to(torch.uint8).view(E4M3), shared) for code in codes]
    mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1)
    exponent = exponent - 3 + (mantissa >= 7 / 8).to(exponent.dtype)
    return [_powers(exponent + step) for step in STEPS_E8M0]


def _of_e4m3(numbers: Tensor, shared: Tensor | float) -> Tensor:
    return numbers.to(torch.float32) / shared


def _powers(exponents: Tensor) -> Tensor:
    """2 ** exponents, float32, within the range of E8M0."""
    clamped = exponents.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    return torch.ldexp(torch.ones(clamped.shape, device=clamped.device), clamped)


def _error(groups: Tensor, scales: Tensor, cost: Tensor | None) -> Tensor:
    """(R, G): Σ c (ŵ - w)² with the nearest codes."""
    restored = E2M1.values(E2M1.nearest(groups / scales[..., None])).mul_(scales[..., None])
    squares = restored.sub_(groups).square_()
    return (squares if cost is None else squares.mul_(cost)).sum(-1)
