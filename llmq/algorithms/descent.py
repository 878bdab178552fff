"""Coordinate descent on codes (the quantized values): move one code of a row at a time to its best value.

The loss of a row is δ H δᵀ with δ = w* - ŵ.  With g = δ H, moving the code of column j by a changes it by exactly

    (a s_j)² H_jj - 2 a s_j g_j,        which is least at  a = g_j / (s_j H_jj)

The loss is a parabola in a, so the best integer a is the nearest one; the code is clamped to the grid.  Then
g -= a s_j H_j.  No step can raise the loss.  Where no step lowers it, a local minimum is reached.  GPTQ (Babai's
nearest plane) fixes each code once; descent comes back to all of them (CDQuant, Nair and Suggala 2024,
arXiv:2406.17542; QuantEase, Behdin et al. 2023, arXiv:2309.01885).

Rows are independent and are processed together.  Columns are processed in blocks of 128: g is updated at once inside a
block, and by one matrix product per block for the later columns.  There is one sweep: more sweeps lower the loss on the
calibration text but not on other text.

**Inside a block this is GPTQ's loop.**  Let L be the lower triangle of the block of H, D its diagonal, c the minimum of
the parabola when a column is visited, ŵ' what c is rounded to and e = c - ŵ'.  Earlier columns moved by ŵ' - ŵ, so

    D (c - ŵ) = g - (L - D)(ŵ' - ŵ)        hence        c = ŵ + L⁻¹ g - (A - 1) e        with  A = L⁻¹ D

where A is lower triangular with ones on its diagonal: a start, and a feedback of the errors to the later columns.
That is `llmq_kernels.gptq_block` with Aᵀ in the place of U.

No product is needed to see that a row gets no worse: a move by m = ŵ' - ŵ changes the loss by  -H_jj m (m + 2 e),
which is never above zero, because ŵ' is the value nearest to c.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.algorithms import Options
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.value_table import value_table
from llmq_kernels.gptq_block import op as gptq_block
from llmq_kernels.gptq_block.problem import Problem

COLUMNS = 128


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`."""
    codes = _sweep(target, quantized.dequantize(), quantized, hessian)
    return dataclasses.replace(quantized, codes=codes.T.contiguous())


def _sweep(target: Tensor, rounded: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Codes (K, N) uint8 after one sweep over the columns."""
    groups = quantized.column_groups()
    scales = quantized.scales.to(torch.float32).T.contiguous()  # (G, N)
    zeros = torch.full_like(scales, float(quantized.scheme.middle))
    if quantized.zeros is not None:
        zeros = quantized.zeros.to(torch.float32).T.contiguous()
    values = rounded.T.contiguous()  # (K, N): a column is contiguous
    gradient = hessian @ (target.T - values)  # (K, N)
    table = value_table(quantized.scheme)
    steps = _as_floats if table is None else table.values
    old = steps(quantized.codes.T)
    codes = torch.empty(old.shape, dtype=torch.uint8, device=old.device)
    for start in range(0, len(values), COLUMNS):
        block = slice(start, min(start + COLUMNS, len(values)))
        inverse = _inverse_of_lower(hessian[block, block])
        feedback = (inverse * hessian[block, block].diagonal()).T.contiguous()
        starts = values[block] + inverse @ gradient[block]
        group_of = groups[block].to(torch.int32)
        new_codes = gptq_block.compensate(
            Problem(
                starts[None], feedback[None], scales[None], zeros[None], group_of[None], quantized.scheme.levels, table
            )
        )
        codes[block] = new_codes[0]
        moves = (steps(new_codes[0]) - old[block]).mul_(scales[group_of])
        gradient[block.stop :].addmm_(hessian[block.stop :, block], moves, alpha=-1)
    return codes


def _as_floats(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


def _inverse_of_lower(block: Tensor) -> Tensor:
    """The inverse (B, B) of the lower triangle of `block`, computed in float64, which correlated inputs need."""
    identity = torch.eye(len(block), dtype=torch.float64, device=block.device)
    inverse: Tensor = torch.linalg.solve_triangular(block.to(torch.float64), identity, upper=False)
    return inverse.to(block.dtype)
