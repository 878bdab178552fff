"""The static scale of a layer's inputs: the one with the least squared error of the layer's output.

    argmin_s  Σ_bins  count · (x - x̂)²        x̂ as in `numerics/fake_quantize.py`

A large s loses precision for all inputs, a small one clips the largest. The histogram weights the inputs of a column by
its sum of squares (`numerics/input_histogram.py`); products of errors of different columns are neglected.
"""

import torch
from torch import Tensor

from llmq.numerics.fake_quantize import HALF_RANGES, global_scale, nearest
from llmq.numerics.input_histogram import InputHistogram
from llmq.numerics.scheme import InputScheme

CANDIDATES = 160
SMALLEST = 0.02  # the smallest range that is tried, as a part of the largest input
AT_ONCE = 16  # candidates, which bounds memory


def calibrated_scale(scheme: InputScheme, histogram: InputHistogram, dtype: torch.dtype) -> float:
    """The number that is stored for inputs in `scheme`: a static scale of `dtype`, or the global scale of nvfp4."""
    if scheme.scales == "local":
        return global_scale(_largest(histogram.counts, histogram.limit))
    return least_error_scale(histogram.counts, histogram.limit, dtype, scheme.dtype)


def _largest(counts: Tensor, limit: float) -> float:
    """The upper end of the last bin that is not empty, 0 if all inputs are 0."""
    filled = counts.nonzero().flatten()
    return (int(filled.max()) + 1) * limit / len(counts) if len(filled) else 0.0


def least_error_scale(counts: Tensor, limit: float, dtype: torch.dtype, kind: str) -> float:
    """The scale, a value of `dtype`, from a histogram of |x|: `counts` (B,) of equal bins from 0 to `limit`.

    `kind` is the dtype of the quantized inputs, int8 or fp8.

    1 if all inputs are 0.
    """
    largest, width = _largest(counts, limit), limit / len(counts)
    if largest == 0:
        return 1.0
    parts = torch.logspace(0, torch.log10(torch.tensor(SMALLEST)).item(), CANDIDATES, dtype=torch.float64)
    limits = torch.finfo(dtype)
    subnormal = limits.tiny * limits.eps  # inputs of 1e-3 need scales below the normal numbers of float16
    candidates = (largest * parts / HALF_RANGES[kind]).clamp(subnormal, limits.max)
    candidates = candidates.to(dtype).to(torch.float64).to(counts.device)
    x = (torch.arange(len(counts), dtype=torch.float64, device=counts.device) + 0.5) * width
    errors = [_errors(x, counts, chunk, kind) for chunk in candidates.split(AT_ONCE)]
    return float(candidates[torch.cat(errors).argmin()])


def _errors(x: Tensor, counts: Tensor, scales: Tensor, kind: str) -> Tensor:
    """(S,) the squared error of each of the `scales` (S,)."""
    s = scales[:, None]
    rounded = s * nearest(x / s, kind)
    return (x - rounded).square_() @ counts
