"""Refit the scales of nvfp4 and mxfp4: one scale after the other, each to the best value that the file can hold.

Few numbers can be scales (E4M3 or powers of two), so rounding the solution of `refit.py` would lose what it gains.
But the loss of a row is a parabola in each of its scales, as in `refit_k_quants.py`:

    s_g ← nearest to  s_g + g uᵀ / u H uᵀ        u = the values of the codes of group g,  g = δ H,  δ = w* - ŵ

where `nearest` is among the scales of the file, of which the one nearest to the minimum of a parabola has the least
loss.  So no step raises the loss.  Codes are the quantized values; they do not change.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.numerics import float_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq_kernels.value_tables import E2M1


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """See `RefinementStage`; `quantized` is on one of these grids."""
    gradient = (target - quantized.dequantize()) @ hessian  # (N, K)
    values, scales = E2M1.values(quantized.codes), quantized.scales.clone()
    width = values.shape[1] // scales.shape[1]
    for group in range(scales.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        direction = values[:, columns]  # (N, g)
        curvature = (direction @ hessian[columns, columns]).mul_(direction).sum(1)
        step = (gradient[:, columns] * direction).sum(1) / curvature
        wanted = scales[:, group] + torch.nan_to_num(step, 0.0, 0.0, 0.0)
        nearest = float_grid.storable(wanted[:, None], quantized.scheme, quantized.shared)[:, 0]
        moved = torch.where(wanted > 0, nearest, scales[:, group])
        gradient -= (direction * (moved - scales[:, group])[:, None]) @ hessian[columns]
        scales[:, group] = moved
    return dataclasses.replace(quantized, scales=scales)
