"""The entry point of GPTQ's inner loop: arguments are checked once, and the device decides which path runs.

Grids that are not uniform run in torch on every device.  Products in float32 never use TF32 (`full_precision.py`).  No
call synchronizes with the device.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.arguments import require
from llmq_kernels.errors import KernelInputError
from llmq_kernels.full_precision import without_tf32
from llmq_kernels.gptq_block import torch_path
from llmq_kernels.gptq_block.problem import Problem

BLOCK = 128  # columns between two matrix products


def compensate(problem: Problem) -> Tensor:
    """Quantize every column; returns codes (E, K, N) uint8 and overwrites `problem.columns` with the errors e.

    With δ (K,) the weight of a row minus its quantized value, in visiting order, e = δ U⁻¹, so δ H δᵀ = Σ e².
    """
    codes = torch.empty(problem.columns.shape, dtype=torch.uint8, device=problem.columns.device)
    K = problem.columns.shape[1]
    for start in range(0, K, BLOCK):
        quantize_columns(problem, codes, start, min(start + BLOCK, K))
    return codes


def quantize_columns(problem: Problem, codes: Tensor, start: int, stop: int) -> None:
    """Quantize columns start..stop into `codes` (E, K, N) uint8 and update all later columns, both in place.

    `problem.columns` at start..stop holds the errors e afterwards.  For callers that choose a grid between two calls;
    `compensate` is the loop over blocks.  Raises KernelInputError for other codes or a wrong range.
    """
    columns = problem.columns
    require("codes", codes, (torch.uint8,), tuple(columns.shape), columns.device)
    if not 0 <= start <= stop <= columns.shape[1]:
        raise KernelInputError(f"columns {start} to {stop} of {columns.shape[1]}: expected a range within the columns")
    if columns.numel() == 0:
        return
    with without_tf32() if columns.is_cuda else nullcontext():
        if backend.choose(columns.device).name == "triton" and problem.table is None:
            from llmq_kernels.gptq_block import triton_kernel

            triton_kernel.quantize_columns(problem, codes, start, stop)
        else:
            torch_path.quantize_columns(problem, codes, start, stop)
