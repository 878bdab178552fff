"""Coordinate descent on codes: move one code of a row at a time to where the loss is least, the others fixed.

The loss of a row is δ H δᵀ with δ = w* - ŵ.  With g = δ H, moving the code of column j by a changes it by exactly

    (a s_j)² H_jj - 2 a s_j g_j,        which is least at  a = g_j / (s_j H_jj)

and among whole numbers at the nearest one, as it is a parabola; the code is kept on the grid.  Then g -= a s_j H_j.  No
step can raise the loss, and where none lowers it a local minimum is reached.  This is the greedy search of Babai's
nearest plane turned around: GPTQ fixes a code and never comes back to it, descent comes back to all of them (CDQuant,
Nair and Suggala 2024, arXiv:2406.17542; QuantEase, Behdin et al. 2023, arXiv:2309.01885).

Rows are independent and go together.  Columns go in blocks of 128: inside a block g is kept up to date at once, behind
it by one matrix product a block.  One sweep: further ones lower the loss on the calibration text and not on other text.

**Inside a block this is GPTQ's loop.**  Let L be the lower triangle of the block of H, D its diagonal, c the parabola's
minimum when a column's turn comes, ŵ' what c is rounded to and e = c - ŵ'.  The columns before have moved by ŵ' - ŵ, so

    D (c - ŵ) = g - (L - D)(ŵ' - ŵ)        hence        c = ŵ + L⁻¹ g - (A - 1) e        with  A = L⁻¹ D

where A is lower triangular with ones on its diagonal: a start, and a feedback of the errors to the columns to come.
That is `llmq_kernels.gptq_block` with Aᵀ in the place of U.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.algorithms import Options, output_error
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq_kernels.gptq_block import op as gptq_block
from llmq_kernels.gptq_block.problem import Problem

COLUMNS = 128


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`."""
    before = quantized.dequantize()
    codes = _sweep(target, before, quantized, hessian)
    moved = dataclasses.replace(quantized, codes=codes.T.contiguous())
    # Every step is one down in exact numbers; in float32 a row at its minimum may go up by a last bit.
    worse = output_error(target, moved.dequantize(), hessian) > output_error(target, before, hessian)
    moved.codes[worse] = quantized.codes[worse]
    return moved


def _sweep(target: Tensor, rounded: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Codes (K, N) uint8 after one pass over the columns."""
    groups = quantized.column_groups()
    scales = quantized.scales.to(torch.float32).T.contiguous()  # (G, N)
    zeros = torch.full_like(scales, float(quantized.scheme.middle))
    if quantized.zeros is not None:
        zeros = quantized.zeros.to(torch.float32).T.contiguous()
    values = rounded.T.contiguous()  # (K, N): a column is contiguous
    gradient = hessian @ (target.T - values)  # (K, N)
    old = quantized.codes.T.to(torch.float32)
    codes = torch.empty(old.shape, dtype=torch.uint8, device=old.device)
    for start in range(0, len(values), COLUMNS):
        block = slice(start, min(start + COLUMNS, len(values)))
        inverse = _inverse_of_lower(hessian[block, block])
        feedback = (inverse * hessian[block, block].diagonal()).T.contiguous()
        begin = values[block] + inverse @ gradient[block]
        own = groups[block].to(torch.int32)
        found = gptq_block.compensate(
            Problem(begin[None], feedback[None], scales[None], zeros[None], own[None], quantized.scheme.levels)
        )
        codes[block] = found[0]
        moves = (found[0].to(torch.float32) - old[block]).mul_(scales[own])
        gradient[block.stop :].addmm_(hessian[block.stop :, block], moves, alpha=-1)
    return codes


def _inverse_of_lower(block: Tensor) -> Tensor:
    """The inverse (B, B) of the lower triangle of `block`, found in float64: correlated inputs ask for it."""
    identity = torch.eye(len(block), dtype=torch.float64, device=block.device)
    inverse: Tensor = torch.linalg.solve_triangular(block.to(torch.float64), identity, upper=False)
    return inverse.to(block.dtype)
