"""Blocks of columns in torch, for any device: column by column inside a block, one matrix product after it.

Nothing is read back from the device.
"""

import torch
from torch import Tensor

from llmq_kernels.gptq_block.problem import Problem
from llmq_kernels.value_tables import ValueTable


def quantize_columns(problem: Problem, codes: Tensor, start: int, stop: int) -> None:
    """See `op.quantize_columns`; start..stop is one block of any width."""
    experts = zip(
        problem.columns, codes, problem.upper, problem.scales, problem.zeros, problem.group_of[:, start:stop],
        strict=True,
    )  # fmt: skip
    for W, C, U, scale, zero, groups in experts:
        scales, zeros = scale.index_select(0, groups), zero.index_select(0, groups)  # (B, N)
        inner = U[start:stop, start:stop]
        if problem.table is not None:
            errors = _quantize_values(W[start:stop], C[start:stop], inner, scales, problem.table)
        else:
            errors = _quantize_block(W[start:stop], C[start:stop], inner, scales, zeros, problem.levels)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        W[start:stop] = errors


def _quantize_block(block: Tensor, codes: Tensor, inner: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """The errors (B, N) of one block of columns (B, N) of one expert; `inner` (B, B) is its part of the factor."""
    errors = torch.empty_like(block)
    for i, pivot in enumerate(inner.diagonal()):
        scale, zero = scales[i], zeros[i]
        code = (block[i] / scale).add_(zero).round_().clamp_(0, levels)
        codes[i] = code
        torch.sub(block[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(pivot)
        block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _quantize_values(block: Tensor, codes: Tensor, inner: Tensor, scales: Tensor, table: ValueTable) -> Tensor:
    """`_quantize_block` for a grid that is not uniform."""
    errors = torch.empty_like(block)
    for i, pivot in enumerate(inner.diagonal()):
        code = table.nearest(block[i] / scales[i])
        codes[i] = code
        torch.sub(block[i], table.values(code).mul_(scales[i]), out=errors[i]).div_(pivot)
        block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
    return errors
