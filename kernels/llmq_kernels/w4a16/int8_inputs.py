"""Inputs in int8 on a CPU: integer products, with exact sums, where the processor has instructions for them.

The inputs of a layer are rounded to integers v (M, K) with a scale per row, and the codes of a symmetric weight are
integers, too.  So each group of columns is a product of int8 matrices with sums in int32, which torch computes
(`torch._int_mm`):

    y = scale of x * sum over groups g of scale[g] * (v[g] C[g]ᵀ)

    cpu_words  (G, N, K / G) int8      code - 2**(bits - 1)
    cpu_grid   (G, N) float32        scales

The sums are those of an engine with 8-bit products.  A product of floats in bfloat16, as in `small_batches.py`, has a
rounding error that is about as large as the effect of rounding the inputs.

On AVX-512 with VNNI this is three to six times as fast as `cpu.py` at all numbers of rows.  Without such instructions
it is slower, and the sums of oneDNN may even saturate.  So the speed and extreme sums are tried once per process.
`LLMQ_CPU_INT4` decides without the measurement, as for `small_batches.py`.
"""

import functools
import os
from functools import partial

import torch
from torch import Tensor

from llmq_kernels.w4a16 import cpu, layout
from llmq_kernels.w4a16.packed_weight import PackedWeight
from llmq_kernels.w4a16.small_batches import MARGIN, VARIABLE, Choice, best_seconds

TRIED, GROUP, ROWS = 1024, 128, (1, 16)  # a weight of 1024 x 1024 in groups of 128, by 1 and 16 rows of x


def choose() -> Choice:
    """The choice of this process; measured at the first call."""
    return _choose(os.environ.get(VARIABLE, "auto"))


def describe() -> str:
    """The choice in words, as `llmq env` prints it."""
    choice = choose()
    return f"integer products for int8 inputs on CPU: {'used' if choice.rows else 'not used'} ({choice.reason})"


def prepare(weight: PackedWeight[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(cpu_words, cpu_grid) of a symmetric weight of up to 8 bits on a CPU; None where integers do not serve it."""
    words, scales, zeros, bits, in_features, columns_per_group, *_ = weight
    G, N = scales.shape
    if zeros is not None or words.device.type != "cpu" or N == 0 or not choose().rows:
        return None
    if G > 1 and G * columns_per_group != in_features:
        return None
    signed = (layout.unpack(words, bits, in_features).to(torch.int16) - (1 << bits - 1)).to(torch.int8)  # (N, K)
    return signed.view(N, G, -1).transpose(0, 1).contiguous(), scales.to(torch.float32).contiguous()


def linear(values: Tensor, words: Tensor, grid: Tensor, column_order: Tensor | None) -> Tensor:
    """values (M, K) int8 -> (M, N) float32, without the scale of the inputs."""
    if column_order is not None:
        values = values.index_select(1, column_order)
    G = words.shape[0]
    groups = values.view(values.shape[0], G, -1).transpose(0, 1).contiguous()  # (G, M, K / G)
    y = torch._int_mm(groups[0], words[0].t()) * grid[0]
    for g in range(1, G):
        y.addcmul_(torch._int_mm(groups[g], words[g].t()), grid[g])
    return y


@functools.cache
def _choose(setting: str) -> Choice:
    if setting == "off":
        return Choice(0, f"{VARIABLE}=off")
    try:
        if not _exact():
            return Choice(0, "sums of extreme values are wrong on this processor")
        return Choice(1, f"{VARIABLE}=on") if setting == "on" else _faster()
    except (AttributeError, RuntimeError) as error:  # a torch without the op, or one that does not take these arguments
        return Choice(0, f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}")


def _exact() -> bool:
    """Whether the sums of the largest products of either sign are exact; without VNNI they may saturate."""
    for sign in (-128, 127):
        for rows in ROWS:
            values = torch.full((rows, GROUP), sign, dtype=torch.int8)
            codes = torch.full((GROUP, GROUP), -128, dtype=torch.int8)
            if not bool((torch._int_mm(values, codes.t()) == -128 * sign * GROUP).all()):
                return False
    return True


def _faster() -> Choice:
    codes = torch.arange(TRIED * TRIED, dtype=torch.int32).remainder_(13).view(TRIED, TRIED).to(torch.uint8)
    scales = torch.full((TRIED // GROUP, TRIED), 2.0**-6)
    weight: PackedWeight[Tensor] = PackedWeight(layout.pack(codes, 4), scales, None, 4, TRIED, GROUP)
    signed = (codes.to(torch.int16) - 8).to(torch.int8).view(TRIED, -1, GROUP).transpose(0, 1).contiguous()
    ratios = []
    for rows in ROWS:
        values = torch.ones(rows, TRIED, dtype=torch.int8)
        integers, floats = best_seconds(
            partial(linear, values, signed, scales, None), partial(cpu.linear, values.float(), weight, None)
        )
        ratios.append(floats / integers)
    listed = " and ".join(f"{ratio:.1f}" for ratio in ratios)
    reason = f"measured: {listed} times as fast as floats by pieces at 1 and 16 rows"
    return Choice(1 if min(ratios) * MARGIN >= 1 else 0, reason)
