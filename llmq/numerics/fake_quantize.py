"""Fake quantization of inputs: floats with the values that an engine with quantized inputs would multiply.

    int8    x̂ = scale * clamp(round(x / scale), -128, 127)           with rounding half to even
    fp8     x̂ = scale * float8_e4m3fn(clamp(x / scale, -448, 448))
    nvfp4   x̂ = scale * e2m1(clamp(x / scale, -6, 6))                with rounding half to even

    dynamic per token     scale = max|x| / half range, one scale per token (the last dimension is a row)
    static per tensor     scale is a number, from the calibration text
    dynamic per 16        scale = float8_e4m3fn(global * max|x| / 6) / global, one per 16 inputs of a token, and global
                          = 448 * 6 / the largest |x| of the calibration text

The half range is 127.5 or 448.  This is the convention of compressed-tensors, so its checkpoints give the same results
in transformers.  vLLM's kernels for int8 divide by 127 instead.  All values are computed in float32; compressed-tensors
computes in the dtype of the model.  A token with a NaN or an infinity has a scale that is not finite, so that they do
not disappear among the values; compressed-tensors clips infinities under a static scale.

Rounding has no useful gradient, so the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432):
∂x̂/∂x = 1.

Not here: which layers have quantized inputs (`model/build/input_rounding.py`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.numerics.float_grid import E4M3, LARGEST_E4M3, TOP
from llmq.numerics.scheme import FLOAT_GRIDS, InputScheme

HALF_RANGES = {"int8": 127.5, "fp8": 448.0}  # half of the distance from the smallest value to the largest
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
INSTEAD_OF_ZERO = torch.finfo(E4M3).eps  # as compressed-tensors, for groups far below the largest

Rounding = Callable[[Tensor], Tensor]
"""Inputs (…, K) of any float dtype -> quantized and dequantized again, in the same shape and dtype."""


def rounding_for(scheme: InputScheme) -> Rounding:
    """The function that fake-quantizes inputs in `scheme`; raises ConfigError if it has no scale yet."""
    if scheme.calibrated and scheme.scale is None:
        raise ConfigError(
            f"inputs in {scheme} without a scale cannot be simulated",
            hint="use dynamic scales, such as InputScheme('int8', 'dynamic'), or give the scale",
        )
    return partial(fake_quantized, scheme=scheme)


def fake_quantized(x: Tensor, scheme: InputScheme) -> Tensor:
    """`x` (…, K) with the values of `scheme`, in its dtype; the gradient passes straight through."""
    rounded: Tensor = _StraightThrough.apply(x, scheme.dtype, scheme.scale)  # type: ignore[no-untyped-call]
    return rounded


def int8_values(x: Tensor, fixed: float | None) -> tuple[Tensor, Tensor]:
    """`x` (…, K) as int8 (…, K) and float32 scales (…, 1), whose product is `fake_quantized` in float32."""
    values = x.to(torch.float32)
    scale = _scale_of_tokens(values, "int8", fixed)
    return nearest(values / scale, "int8").to(torch.int8), scale


def _scale_of_tokens(values: Tensor, dtype: str, fixed: float | None) -> Tensor:
    """(…, 1) float32, the scale of each token of `values` (…, K): the `fixed` one, or the dynamic one for None."""
    largest = values.abs().amax(-1, keepdim=True)
    return largest * 0 + fixed if fixed else (largest / HALF_RANGES[dtype]).clamp_min(SMALLEST_SCALE)


def nearest(x: Tensor, dtype: str) -> Tensor:
    """The values of int8 or fp8 nearest to those of `x`, in the dtype of `x`, whose memory may be reused."""
    if dtype == "int8":
        return x.round_().clamp_(-128, 127)
    return x.clamp_(-HALF_RANGES[dtype], HALF_RANGES[dtype]).to(torch.float8_e4m3fn).to(x.dtype)


def global_scale(largest: float) -> float:
    """The global scale of nvfp4 for inputs up to `largest`, a finite float32; 1 if all inputs are 0."""
    return min(LARGEST_E4M3 * TOP / largest, torch.finfo(torch.float32).max) if largest else 1.0


def _in_groups(x: Tensor, shared: float) -> Tensor:
    """Float32 `x` (…, K) rounded to nvfp4 with the global scale `shared`; K is a multiple of 16."""
    groups = x.unflatten(-1, (-1, FLOAT_GRIDS["nvfp4"].group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    scales = (largest / TOP * shared).clamp_max_(LARGEST_E4M3).to(E4M3).to(torch.float32)
    scales = scales.masked_fill_(scales == 0, INSTEAD_OF_ZERO).div_(shared).add_(largest * 0)
    return _nearest_e2m1(groups / scales).mul_(scales).flatten(-2)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """The values of E2M1 nearest to `x`, whose memory is reused: halves below 2, whole numbers below 4, then 4 and 6.

    Halfway values round to the even code, as in compressed-tensors and on GPUs. Those of weights round down
    (`value_tables.py`).
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return x.clamp_(-TOP, TOP).div_(step).round_().mul_(step)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor, dtype: str, fixed: float | None) -> Tensor:
        values = x.to(torch.float32)
        if dtype == "nvfp4":
            assert fixed is not None, "it has a global scale"
            return _in_groups(values, fixed).to(x.dtype)
        scale = _scale_of_tokens(values, dtype, fixed)
        return nearest(values / scale, dtype).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None
