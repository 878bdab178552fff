"""The door to GPTQ's inner loop: arguments are checked once, and the device says which path runs.

Shapes: E experts, K columns in the order in which they are visited, N rows of the weight, G groups.

    columns   (E, K, N) float32   the weight, of any strides; used up
    codes     (E, K, N) uint8     written
    upper     (E, K, K) float32   U, the upper Cholesky factor of H⁻¹ in visiting order, of any strides
    scales    (E, G, N) float32   of any sign, not zero
    zeros     (E, G, N) float32   integers, or in a grid with real offsets any numbers; 2**(bits - 1) where symmetric
    group_of  (E, K)    int32     the group of each visited column
    levels                        2**bits - 1, at most 255

All others are contiguous.  Fast are columns whose rows lie side by side and, on a GPU, a factor that is contiguous.
Float32 products are never done in TF32 here (`full_precision.py`).  No call waits for the device.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.full_precision import without_tf32
from llmq_kernels.gptq_block import torch_path

BLOCK = 128  # columns between two matrix products


def compensate(columns: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, levels: int) -> Tensor:
    """Round every column on its grid; returns codes (E, K, N) uint8 and uses `columns` up.

    Raises KernelInputError unless the arguments are as the head of this file says.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    K = columns.shape[1] if columns.dim() == 3 else 0
    for start in range(0, max(1, K), BLOCK):
        round_columns(columns, codes, upper, scales, zeros, group_of, levels, start, min(start + BLOCK, K))
    return codes


def round_columns(
    columns: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    levels: int,
    start: int,
    stop: int,
) -> None:
    """Round columns start..stop of `columns` into `codes`, and update all columns behind them, both in place.

    What `columns` holds at start..stop afterwards is not defined.  For callers that settle a grid between two calls;
    `compensate` is the loop over blocks.  Raises KernelInputError unless the arguments are as the head of this file
    says and the range lies within the columns.
    """
    check(columns, codes, upper, scales, zeros, group_of, levels, start, stop)
    if columns.numel() == 0:
        return
    with without_tf32() if columns.is_cuda else nullcontext():
        if backend.choose(columns.device).name == "triton":
            from llmq_kernels.gptq_block import triton_kernel

            triton_kernel.round_columns(columns, codes, upper, scales, zeros, group_of, levels, start, stop)
        else:
            torch_path.round_columns(columns, codes, upper, scales, zeros, group_of, levels, start, stop)


def check(
    columns: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    levels: int,
    start: int,
    stop: int,
) -> None:
    """Raise KernelInputError unless `round_columns` can take the arguments.  Values on the device are not read."""
    if columns.dim() != 3 or scales.dim() != 3:
        raise KernelInputError(
            f"columns are {tuple(columns.shape)} and scales {tuple(scales.shape)}, expected (E, K, N) and (E, G, N)"
        )
    (E, K, N), G = columns.shape, scales.shape[1]
    expected = {
        "columns": (columns, torch.float32, (E, K, N)),
        "codes": (codes, torch.uint8, (E, K, N)),
        "upper": (upper, torch.float32, (E, K, K)),
        "scales": (scales, torch.float32, (E, G, N)),
        "zeros": (zeros, torch.float32, (E, G, N)),
        "group_of": (group_of, torch.int32, (E, K)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise KernelInputError(f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        if tensor.device != columns.device:
            raise KernelInputError(f"{name}: found on {tensor.device}, expected on {columns.device} where columns are")
        if not tensor.is_contiguous() and name not in ("columns", "upper"):
            raise KernelInputError(f"{name}: found strides {tensor.stride()} for shape {shape}, expected contiguous")
    if not 1 <= levels <= 255:
        raise KernelInputError(f"levels is {levels}, expected 1 to 255")
    if not 0 <= start <= stop <= K:
        raise KernelInputError(f"columns {start} to {stop} of {K}: expected a range within them")
