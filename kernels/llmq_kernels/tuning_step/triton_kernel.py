"""A program does the step for GROUPS groups of columns; each value is read once and written once.

Programs share nothing, so there are no races.  Groups wider than WIDTH are processed in pieces.  A code is that of
torch for the same v (ties go to the even code, see `gptq_block/triton_kernel.py`), and the weight is that of
`QuantizedTensor.dequantize`, bit for bit: differences and products are not fused (`enable_fp_fusion=False`).  v, mean
and square differ from torch's in their last bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.triton_rounding import nearest_code
from llmq_kernels.tuning_step.rates import EPSILON, MEAN_DECAY, SQUARE_DECAY

TILE = 1024  # weights of a program: 8 per thread, which are one load of 16 bytes in half precision
WARPS = 4


@triton.jit
def step_groups(
    gradient, value, mean, square, origin, scales, zeros, codes, weight, sums,
    count, width, levels, middle, divisor, rate, root, keep_mean, keep_square, epsilon,
    ZEROS: tl.constexpr, RESULT: tl.constexpr, SUMS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`count` groups of `width` columns: gradient of any float dtype, value, mean and square of any, updated in place.

    origin  uint8, q₀; scales any float, zeros int16 if ZEROS, else `middle`: one per group
    codes   uint8, weight any float: written if RESULT
    sums    float32, one per group, Σ G (q - z): written if SUMS
    rate    without the bias of the mean; `root` is that of the square: √(1 - β₂ᵗ)
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = group < count
    scale = tl.load(scales + group, mask=there, other=1.0).to(tl.float32)[:, None]
    zero = middle
    if ZEROS:
        zero = tl.load(zeros + group, mask=there, other=0).to(tl.float32)[:, None]
    total = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = there[:, None] & (column < width)[None, :]
        at = (group * width)[:, None] + column[None, :]
        G = tl.div_rn(tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32), divisor)
        G = tl.where(tl.abs(G) < float("inf"), G, 0.0)  # false for NaN
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(origin + at, mask=inside, other=0).to(tl.float32)
        place = q + v
        if SUMS:
            total += tl.sum(tl.where(inside, G * (nearest_code(place, levels) - zero), 0.0), axis=1)
        slope = G * scale
        slope = tl.where((place > levels) & (slope < 0) | (place < 0) & (slope > 0), 0.0, slope)
        m = keep_mean * m + (1 - keep_mean) * slope
        u = keep_square * u + (1 - keep_square) * slope * slope
        v -= rate * m / (tl.sqrt_rn(u) / root + epsilon)
        stored = v.to(value.dtype.element_ty)
        tl.store(value + at, stored, mask=inside)
        tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
        tl.store(square + at, u.to(square.dtype.element_ty), mask=inside)
        if RESULT:
            code = nearest_code(q + stored.to(tl.float32), levels)
            tl.store(codes + at, code.to(tl.uint8), mask=inside)
            tl.store(weight + at, ((code - zero) * scale).to(weight.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(sums + group, total, mask=there)


def step(
    gradient: Tensor, moments: tuple[Tensor, Tensor, Tensor], origin: Tensor, scales: Tensor, zeros: Tensor | None,
    levels: int, divisor: float, rate: float, number: int,
    result: tuple[Tensor, Tensor] | None, sums: Tensor | None,
) -> None:  # fmt: skip
    """See `op.step`; all tensors are contiguous."""
    groups, K = scales.numel(), origin.shape[1]
    width = K // scales.shape[1]
    piece = min(triton.next_power_of_2(width), TILE)
    at_once = TILE // piece
    codes, weight = result or (origin, gradient)  # not written without a result
    with torch.cuda.device_of(origin):  # Triton launches on the current device; nothing for a CPU tensor
        step_groups[(triton.cdiv(groups, at_once),)](
            gradient, *moments, origin, scales, scales if zeros is None else zeros, codes, weight,
            scales if sums is None else sums,
            groups, width, float(levels), float((levels + 1) // 2), divisor,
            rate / (1 - MEAN_DECAY ** (number + 1)), math.sqrt(1 - SQUARE_DECAY ** (number + 1)),
            MEAN_DECAY, SQUARE_DECAY, EPSILON,
            ZEROS=zeros is not None, RESULT=result is not None, SUMS=sums is not None,
            GROUPS=at_once, WIDTH=piece, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
