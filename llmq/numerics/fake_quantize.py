"""Fake quantization of inputs: floats with the values that an engine with integer inputs would multiply.

    x̂ = scale * clamp(round(x / scale), -128, 127)         with rounding half to even

    int8, dynamic per token     scale = max|x| / 127.5, one scale per token (the last dimension is a row)
    int8, static per tensor     scale is a number, from the calibration text

This is the convention of compressed-tensors for `num_bits 8, symmetric`, so its checkpoints give the same results in
transformers.  vLLM's kernels divide by 127 instead.  All values are computed in float32; compressed-tensors computes in
the dtype of the model.

Rounding has no useful gradient, so the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432):
∂x̂/∂x = 1.

Not here: which layers have quantized inputs (`model/build/input_rounding.py`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.numerics.scheme import InputScheme

HALF_RANGE = 127.5  # half of the distance from -128 to 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Rounding = Callable[[Tensor], Tensor]
"""Inputs (…, K) of any float dtype -> quantized and dequantized again, in the same shape and dtype."""


def rounding_for(scheme: InputScheme) -> Rounding:
    """The function that fake-quantizes inputs in `scheme`; raises ConfigError for a scheme that cannot be simulated."""
    if scheme == InputScheme("int8", "dynamic"):
        return int8_per_token
    if scheme.dtype == "int8" and scheme.scale is not None:
        return partial(int8_per_tensor, scale=scheme.scale)
    unmeasured = "without a scale " if scheme.scales == "static" else ""
    raise ConfigError(
        f"inputs in {scheme} {unmeasured}cannot be simulated, expected int8",
        hint="use InputScheme('int8', 'dynamic'), or a static scheme with a scale",
    )


def int8_per_token(x: Tensor) -> Tensor:
    """`x` (…, K) fake-quantized to int8, one scale per token, in its dtype; the gradient passes straight through."""
    rounded: Tensor = _StraightThrough.apply(x, None)  # type: ignore[no-untyped-call]
    return rounded


def int8_per_tensor(x: Tensor, scale: float) -> Tensor:
    """`x` fake-quantized to int8 with one scale, in its dtype; the gradient passes straight through."""
    rounded: Tensor = _StraightThrough.apply(x, scale)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor, fixed: float | None) -> Tensor:
        values = x.to(torch.float32)
        scale = fixed or (values.abs().amax(-1, keepdim=True) / HALF_RANGE).clamp_min(SMALLEST_SCALE)
        return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
