"""Fake quantization of inputs: the values that an engine with integer inputs would multiply, as floats.

    int8, dynamic per token:    scale = max|x| / 127.5       x̂ = scale * clamp(round(x / scale), -128, 127)

with one scale for each token (the last dimension is a row), and rounding half to even.  That is the convention of
compressed-tensors for `num_bits 8, symmetric, strategy token, dynamic`, so its checkpoints give the same figures in
transformers; vLLM's kernels divide by 127 instead.  Everything is computed in float32; compressed-tensors computes in
the model's dtype.

Rounding has no useful gradient, so the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432):
∂x̂/∂x = 1.

Not here: which layers have quantized inputs (`model/build/input_rounding.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.numerics.scheme import InputScheme

INT8_DYNAMIC = InputScheme("int8", "dynamic")
HALF_RANGE = 127.5  # of the 256 codes
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Rounding = Callable[[Tensor], Tensor]
"""Inputs (…, K) of any float dtype -> the same shape and dtype, on the grid."""


def rounding_for(scheme: InputScheme) -> Rounding:
    """What rounds inputs as `scheme` says; raises ConfigError for a scheme that cannot be simulated."""
    if scheme != INT8_DYNAMIC:
        raise ConfigError(
            f"inputs in {scheme} cannot be simulated, expected {INT8_DYNAMIC}",
            hint="InputScheme('int8', 'dynamic') is the only scheme for inputs that llmq computes today",
        )
    return int8_per_token


def int8_per_token(x: Tensor) -> Tensor:
    """(…, K) on the int8 grid of each token, in the dtype of `x`; the gradient passes straight through."""
    rounded: Tensor = _StraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        values = x.to(torch.float32)
        scale = (values.abs().amax(-1, keepdim=True) / HALF_RANGE).clamp_min(SMALLEST_SCALE)
        return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient
