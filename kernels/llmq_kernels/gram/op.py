"""gram += XᵀX, in place and in float32; only the upper half where that is faster.

    x float16, bfloat16, on CUDA     exact products (11 or 8 bits each, 24 to hold them), sums in float32 in the tensor
                                     cores: Triton's tiles, or cuBLAS by strips without Triton
    anything else                    float32 products; never TF32 (`full_precision.py`)

XᵀX is symmetric.  With `upper_only` the part below the diagonal is undefined, which saves about half the work, until
`mirror` copies it, once after all updates.  Then no path needs more memory than (STRIP, K) besides its arguments.
Sums have the same order on every run.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.full_precision import without_tf32

HALVES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # of the width for Triton's tiles; other widths are computed by strips
STRIP = 256  # rows of the result at once


def update(gram: Tensor, x: Tensor, *, upper_only: bool) -> None:
    """Add XᵀX of x (T, K) float16, bfloat16 or float32 to `gram` (K, K) float32 contiguous, on one device.

    Raises KernelInputError for anything else.
    """
    check(gram, x)
    if x.numel() == 0:
        return
    halves_on_cuda = x.is_cuda and x.dtype in HALVES
    if halves_on_cuda and x.shape[1] % ALIGNMENT == 0 and backend.choose(x.device).name == "triton":
        from llmq_kernels.gram import triton_kernel

        triton_kernel.update(gram, x, upper_only=upper_only)
        return
    X = x if halves_on_cuda else x.to(torch.float32)
    rows = STRIP if upper_only else len(gram)
    for start in range(0, len(gram), rows):
        add_product(gram[start : start + rows, start:], X[:, start : start + rows], X[:, start:])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (R, C) float32 += leftᵀ right, of left (T, R) and right (T, C): both float32, or half precision on CUDA."""
    if right.dtype in HALVES:
        for start in range(0, len(total), STRIP):
            stop = start + STRIP
            total[start:stop] += torch.mm(left[:, start:stop].T, right, out_dtype=torch.float32)
        return
    with without_tf32() if right.is_cuda else nullcontext():
        total.addmm_(left.T, right)


def mirror(gram: Tensor) -> None:
    """Copy the part above the diagonal of `gram` (K, K) below it, in place."""
    for start in range(0, len(gram), STRIP):
        stop = start + STRIP
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def check(gram: Tensor, x: Tensor) -> None:
    """Raise KernelInputError unless the arguments are those that `update` documents."""
    if x.dim() != 2 or x.dtype not in (*HALVES, torch.float32):
        raise KernelInputError(
            f"x is {x.dtype} {tuple(x.shape)}, expected torch.float16, torch.bfloat16 or torch.float32 (T, K)"
        )
    K = x.shape[1]
    if gram.dtype != torch.float32 or gram.shape != (K, K) or not gram.is_contiguous():
        raise KernelInputError(
            f"gram: found {gram.dtype} {tuple(gram.shape)} with strides {gram.stride()}, "
            f"expected torch.float32 ({K}, {K}) contiguous"
        )
    if gram.device != x.device:
        raise KernelInputError(f"gram: found on {gram.device}, expected on {x.device} like x")
