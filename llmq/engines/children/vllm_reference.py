"""Parts of vLLM that replace what it lacks on a CPU: slow, for comparing everything else that vLLM does with a
checkpoint.

* The packed product of 4-bit weights, in float32.  vLLM's own kernel computes in 16 bits, and builds without AVX-512
  lack it.  This one gets the same arguments: the weights as vLLM has read, fused, split and packed them again.
* The rotary embedding for queries and keys of shape (T, H, D), which vLLM's kernel takes for T * H tokens (LFM2).
* vLLM's own emulation of nvfp4 with quantized inputs, which it does not offer on CPUs.
"""

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.platforms.interface import PlatformEnum

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


def rotate(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, *more: object
) -> None:
    """vLLM's rotary embedding, in place: its kernel for CPUs (0.32) takes each head of (T, H, D) for a token, so it
    gets (T, H * D)."""
    flat = (None if heads is None else heads.view(len(positions), -1) for heads in (query, key))
    ROTATE(positions, *flat, head_size, cos_sin_cache, *more)


ROTATE = _custom_ops.rotary_embedding
_custom_ops.cpu_gemm_wna16 = product
_custom_ops.rotary_embedding = rotate
linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")


class Installed:
    """An extension of vLLM's workers: naming it makes each of their processes import this module."""
