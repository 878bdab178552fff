"""A step of `kl_tuning.py` in one kernel, for codes of uniform grids on CUDA (`llmq_kernels/tuning_step`).

Operation by operation, a step of block tuning reads and writes 178 bytes of memory per weight: the gradient in float32,
its product with the scales, where codes end, Adam, the new codes, the new weight.  The kernel moves 30.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.value_table import value_table
from llmq_kernels.tuning_step import op

Moments = tuple[Tensor, Tensor, Tensor]
"""v and Adam's means of its gradient and of its square, (N, K) each; updated in place."""


def takes(origin: QuantizedTensor) -> bool:
    """Whether the kernel runs for a weight: on its device, and on its grid."""
    is_uniform = origin.superblocks is None and origin.group_index is None and value_table(origin.scheme) is None
    return is_uniform and op.runs_on(origin.codes.device)


def advance(
    origin: QuantizedTensor, moments: Moments, gradient: Tensor, divisor: float, rate: float, step: int
) -> tuple[QuantizedTensor, Tensor]:
    """A step against `gradient` (N, K) / `divisor`; the weight after it, and its values in the gradient's dtype."""
    gradient = gradient.contiguous()
    codes, weight = torch.empty_like(gradient, dtype=torch.uint8), torch.empty_like(gradient)
    op.step(_codes(origin, origin.scales), gradient, moments, divisor, rate, step, result=(codes, weight))
    return dataclasses.replace(origin, codes=codes), weight


def update(
    origin: QuantizedTensor, scales: Tensor, moments: Moments, gradient: Tensor, rate: float, step: int
) -> Tensor:
    """A step with the current `scales` (N, G); returns ∂L/∂θ (N, G) at the codes before it."""
    sums = torch.empty_like(scales, dtype=torch.float32)
    op.step(_codes(origin, scales), gradient.contiguous(), moments, 1.0, rate, step, sums=sums)
    return sums.mul_(origin.scales.to(torch.float32))


def _codes(origin: QuantizedTensor, scales: Tensor) -> op.Codes:
    zeros = None if origin.zeros is None else origin.zeros.contiguous()
    return op.Codes(origin.codes.contiguous(), scales.contiguous(), zeros, origin.scheme.levels)
