"""The packed product of vLLM on a CPU, in float32: slow, for comparing everything else that vLLM does with a
checkpoint.

vLLM's own kernel computes in 16 bits, and builds without AVX-512 lack it. This one gets the same arguments: the weights
as vLLM has read, fused, split and packed them again.
"""

import torch
from torch import Tensor

BITS, PER_WORD, BLOCK = 4, 8, 16
SYMMETRIC_ZERO = 8


def unpacked(words: Tensor) -> Tensor:
    """(R, C) int32 -> (R, C * 8) codes, the lowest four bits first."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)


def product(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """`input` (…, K) times the weight, (…, N); `q_weight` (N / 16, 2 K) int32, `scales` (G, N), `zeros` (G, N / 8)."""
    groups, rows = scales.shape
    columns = q_weight.shape[1] // (BLOCK // PER_WORD)
    words = q_weight.view(rows // BLOCK, columns, BLOCK // PER_WORD).permute(1, 0, 2).reshape(columns, -1)
    zero = SYMMETRIC_ZERO if zeros is None else unpacked(zeros).view(groups, 1, rows)
    codes = unpacked(words).view(groups, columns // groups, rows)
    weight = ((codes - zero) * scales.float().unsqueeze(1)).view(columns, rows)
    output = input.float() @ weight
    return (output if bias is None else output + bias.float()).to(input.dtype)


def install() -> None:
    from vllm import _custom_ops

    _custom_ops.cpu_gemm_wna16 = product
