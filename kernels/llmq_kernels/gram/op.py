"""gram += Xᵀ diag(γ) X, in place and in float32; only the upper half where that is faster.

    x float16, bfloat16, on CUDA     exact products (11 or 8 bits each, 24 to hold them), sums in float32 in the tensor
                                     cores: Triton's tiles, or cuBLAS by strips without Triton
    anything else                    float32 products; never TF32 (`full_precision.py`)

The rows of X can have weights γ.  Float32 inputs are multiplied by √γ on both sides.  In half precision one operand is
multiplied by γ and rounded again, so a product has one more rounding error, as large as that of the inputs: 2**-9 in
bfloat16.  (Float32 products instead would be exact, and about ten times slower on a GPU.)

The result is symmetric.  With `upper_only` the part below the diagonal is undefined, which saves about half the work,
until `mirror` copies it, once after all updates.  Then no path needs more memory than (STRIP, K) besides its arguments
and a weighted copy of X.  Sums have the same order on every run.
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


def multiplied_in(dtype: torch.dtype, *, on_cuda: bool) -> torch.dtype:
    """The dtype in which inputs are multiplied: half precision is unchanged on CUDA, all else becomes float32."""
    return dtype if on_cuda and dtype in HALVES else torch.float32


def update(gram: Tensor, x: Tensor, weights: Tensor | None = None, *, upper_only: bool) -> None:
    """Add Xᵀ diag(γ) X of x (T, K) float16, bfloat16 or float32 to `gram` (K, K) float32 contiguous, on one device.

    weights  (T,) float32, γ >= 0; 1 where not given.  With weights, `gram` must be symmetric or `upper_only`

    Raises KernelInputError for anything else.
    """
    check(gram, x)
    if x.numel() == 0:
        return
    X = x.to(multiplied_in(x.dtype, on_cuda=x.is_cuda))
    triton_takes_it = X.dtype in HALVES and weights is None and X.shape[1] % ALIGNMENT == 0
    if triton_takes_it and backend.choose(x.device).name == "triton":
        from llmq_kernels.gram import triton_kernel

        triton_kernel.update(gram, X, upper_only=upper_only)
        return
    left, right, factor = _weighted(X, X, weights)
    rows = STRIP if upper_only or weights is not None else len(gram)
    for start in range(0, len(gram), rows):
        _add(gram[start : start + rows, start:], left[:, start : start + rows], right[:, start:], factor)
    if weights is not None and not upper_only:
        mirror(gram)


def add_product(total: Tensor, left: Tensor, right: Tensor, weights: Tensor | None = None) -> None:
    """total (R, C) float32 += leftᵀ diag(γ) right, of left (T, R) and right (T, C), with weights γ (T,) as in `update`.

    left and right are both float32, or of the same half precision on CUDA.
    """
    left, right, factor = _weighted(left, right, weights)
    _add(total, left, right, factor)


def half_product(left: Tensor, right: Tensor) -> Tensor:
    """left right in float32, of left (R, T) and right (T, C) in half precision, on CUDA."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _weighted(left: Tensor, right: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two operands and a number, whose product is leftᵀ diag(γ) right.

    In half precision the largest weight is this number, so that no weighted input is larger than the input itself and
    overflows.
    """
    if weights is None:
        return left, right, None
    if right.dtype in HALVES:
        largest = weights.max().clamp(min=torch.finfo(torch.float32).tiny)
        return left, (right * (weights / largest)[:, None]).to(right.dtype), largest
    roots = weights.sqrt()[:, None]
    return left * roots, right * roots, None


def _add(total: Tensor, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
    """total (R, C) += factor · leftᵀ right."""
    if right.dtype not in HALVES:
        with without_tf32() if right.is_cuda else nullcontext():
            total.addmm_(left.T, right)
        return
    for start in range(0, len(total), STRIP):
        stop = start + STRIP
        product = half_product(left[:, start:stop].T, right)
        total[start:stop] += product if factor is None else product.mul_(factor)


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
