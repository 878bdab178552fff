"""The simplest Triton kernel: GPTQ's int32 layout, codes unpacked by shifts, converted, scaled, multiplied.

The version before `llmq_kernels.w4a16`.  Weights are the right operand, so they go through registers to shared memory
and back; every code is converted from an integer; K is not split.  `dequantize` writes the whole weight for cuBLAS.

    qweight (K / 8, N) int32: nibble i of word k, n is the code of column 8 k + i of row n
    w[n, k] = scales[g, n] * (code - zeros[g, n]), g = k // group
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _weights(qweight, scales, zeros, k, n, mask, N, GROUP: tl.constexpr):
    """(BK, BN) float32 of the columns k (BK,) and the rows n (BN,); k lies within one group."""
    words = tl.load(qweight + (k // 8)[:, None] * N + n[None, :], mask=mask, other=0)
    codes = (words >> ((k % 8) * 4)[:, None]) & 15
    group = (k // GROUP)[:, None] * N + n[None, :]
    scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zeros + group, mask=mask, other=0).to(tl.float32)
    return (codes.to(tl.float32) - zero) * scale


@triton.jit
def _linear(
    x, qweight, scales, zeros, out, M, N, K, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        rows = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        mask = (k < K)[:, None] & (n < N)[None, :]
        weights = _weights(qweight, scales, zeros, k, n, mask, N, GROUP)
        total = tl.dot(rows, weights.to(rows.dtype), total)
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _dequantize(qweight, scales, zeros, out, N, K, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (k < K)[:, None] & (n < N)[None, :]
    weights = _weights(qweight, scales, zeros, k, n, mask, N, GROUP)
    tl.store(out + k[:, None] * N + n[None, :], weights.to(out.dtype.element_ty), mask)


def pack(codes: Tensor) -> Tensor:
    """Codes (N, K) uint8 -> qweight (K / 8, N) int32."""
    fields = codes.T.reshape(-1, 8, codes.shape[0])  # (K / 8, 8, N)
    words = torch.zeros(fields.shape[0], fields.shape[2], dtype=torch.int32, device=codes.device)
    for i in range(8):
        words |= fields[:, i].to(torch.int32) << 4 * i
    return words


def linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """x (M, K), qweight (K / 8, N), scales and zeros (G, N) -> (M, N) in x's dtype."""
    (M, K), N = x.shape, qweight.shape[1]
    out = x.new_empty(M, N)
    BM, BN = (16 if M <= 16 else 64), (32 if x.device.type == "cpu" else 64)
    grid = (triton.cdiv(N, BN), triton.cdiv(M, BM))
    _linear[grid](
        x, qweight, scales, zeros, out, M, N, K,
        GROUP=group, BM=BM, BN=BN, BK=64, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor, group: int, out: Tensor) -> Tensor:
    """The weight, transposed, into `out` (K, N) of a float dtype."""
    K, N = out.shape
    grid = (triton.cdiv(N, 128), triton.cdiv(K, 32))
    _dequantize[grid](qweight, scales, zeros, out, N, K, GROUP=group, BN=128, BK=32, num_warps=4, enable_fp_fusion=True)
    return out
