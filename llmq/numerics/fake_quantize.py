"""Fake quantization of inputs: floats with the values that an engine with integer inputs would multiply.

    int8, dynamic per token:    scale = max|x| / 127.5       x̂ = scale * clamp(round(x / scale), -128, 127)

with one scale per token (the last dimension is a row), and rounding half to even.  This is the convention of
compressed-tensors for `num_bits 8, symmetric, strategy token, dynamic`, so its checkpoints give the same results in
transformers.  vLLM's kernels divide by 127 instead.  All values are computed in float32; compressed-tensors computes in
the dtype of the model.

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
HALF_RANGE = 127.5  # half of the distance from -128 to 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Rounding = Callable[[Tensor], Tensor]
"""Inputs (…, K) of any float dtype -> quantized and dequantized again, in the same shape and dtype."""


def rounding_for(scheme: InputScheme) -> Rounding:
    """The function that fake-quantizes inputs in `scheme`; raises ConfigError for a scheme that cannot be simulated."""
    if scheme != INT8_DYNAMIC:
        raise ConfigError(
            f"inputs in {scheme} cannot be simulated, expected {INT8_DYNAMIC}",
            hint="use InputScheme('int8', 'dynamic'), the only scheme for inputs that llmq computes",
        )
    return int8_per_token


def int8_per_token(x: Tensor) -> Tensor:
    """`x` (…, K) fake-quantized to int8, one scale per token, in its dtype; the gradient passes straight through."""
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
