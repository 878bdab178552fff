"""Coordinate descent on codes: move one code of a row at a time to where the loss is least, the others fixed.

The loss of a row is δ H δᵀ with δ = w* - ŵ.  With g = δ H, moving the code of column j by a changes it by exactly

    (a s_j)² H_jj - 2 a s_j g_j,        which is least at  a = g_j / (s_j H_jj)

and among whole numbers at the nearest one, as it is a parabola; the code is kept on the grid.  Then g -= a s_j H_j.  No
step can raise the loss, and where none lowers it a local minimum is reached.  This is the greedy search of Babai's
nearest plane turned around: GPTQ fixes a code and never comes back to it, descent comes back to all of them (CDQuant,
Nair and Suggala 2024, arXiv:2406.17542; QuantEase, Behdin et al. 2023, arXiv:2309.01885).

Rows are independent and go together.  Columns go in blocks of 128: inside a block g is kept up to date at once, behind
it by one matrix product a block.  One sweep: further ones lower the loss on the calibration text and not on other text.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.algorithms import Options, output_error
from llmq.quantized import QuantizedTensor

COLUMNS = 128


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`."""
    before = quantized.dequantize()
    codes = _sweep(target, before, quantized, hessian)
    moved = dataclasses.replace(quantized, codes=codes.T.contiguous().to(torch.uint8))
    # Every step is one down in exact numbers; in float32 a row at its minimum may go up by a last bit.
    worse = output_error(target, moved.dequantize(), hessian) > output_error(target, before, hessian)
    moved.codes[worse] = quantized.codes[worse]
    return moved


def _sweep(target: Tensor, rounded: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Codes (K, N) float32 after one pass over the columns."""
    groups = quantized.column_groups().tolist()  # on a GPU an index that is a tensor waits for it
    scales = quantized.scales.to(torch.float32).T.contiguous()  # (G, N)
    codes = quantized.codes.T.to(torch.float32)  # (K, N): a column is contiguous
    gradient = hessian @ (target - rounded).T  # (K, N)
    diagonal = hessian.diagonal()
    for start in range(0, len(codes), COLUMNS):
        stop = min(start + COLUMNS, len(codes))
        inside = hessian[start:stop, start:stop]
        moves = torch.zeros_like(codes[start:stop])
        for column in range(start, stop):
            scale = scales[groups[column]]
            best = (codes[column] + gradient[column] / (scale * diagonal[column])).round_()
            best.clamp_(0, quantized.scheme.levels)
            move = (best - codes[column]) * scale
            codes[column] = best
            moves[column - start] = move
            gradient[start:stop].addr_(inside[column - start], move, alpha=-1)
        gradient[stop:].addmm_(hessian[stop:, start:stop], moves, alpha=-1)
    return codes
