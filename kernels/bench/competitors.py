"""The product by our op and by others: each contender is prepared from the same codes, or refuses with a reason.

cublas        torch.mm on a 16-bit weight: what a model that is not quantized runs
tinygemm      torch's own int4 product, bf16 only.  Its weight is (code - 8) s + z, so z = (8 - zero) s
naive_triton  `triton_naive.linear`
dequantize    `triton_naive.dequantize` into a buffer, then cuBLAS, in each call
gemlite       the fastest published Triton kernel, where it is installed
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.weights import Packed, codes, copies_for
from llmq_kernels.w4a16 import op as _op  # noqa: F401  (registers llmq::w4a16_linear)

INNER_TILES = 8  # of tinygemm's layout
FEW_ROWS = 256  # above, tinygemm and the naive kernel are not useful, and take long
ANY_ROWS = 1 << 30


@dataclass(frozen=True)
class Prepared:
    """`multiply(i, x)` is x (M, K) times copy i of the weight, (M, N); `exact` if it is the packed weight."""

    multiply: Callable[[int, Tensor], Tensor]
    copies: int
    exact: bool = True
    most_rows: int = ANY_ROWS


class NotAvailableError(Exception):
    """The contender cannot run this case; the message says why."""


Maker = Callable[[Packed, torch.dtype, int], Prepared]


def ours(packed: Packed) -> Prepared:
    """The op as a model calls it."""

    def multiply(i: int, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.llmq.w4a16_linear(x, None, *packed.weight(i))
        return product

    return Prepared(multiply, packed.copies)


def cublas(packed: Packed, dtype: torch.dtype, cache: int) -> Prepared:
    """x Wᵀ with a random W (N, K) in 16 bits."""
    (_, N, _), K = packed.words.shape, packed.in_features
    copies = copies_for(N * K * dtype.itemsize, cache)
    weights = [torch.randn(N, K, dtype=dtype, device=packed.words.device).mul_(0.02).T for _ in range(copies)]
    return Prepared(lambda i, x: torch.mm(x, weights[i]), copies, exact=False)


def tinygemm(packed: Packed, dtype: torch.dtype, cache: int) -> Prepared:
    """`torch._weight_int4pack_mm`, weights in its tiled layout."""
    if dtype != torch.bfloat16:
        raise NotAvailableError("bf16 only")
    one = codes(packed)  # (N, K)
    scales, zeros, group = packed.scales[0], packed.zeros_of(0), packed.group
    offset = torch.zeros_like(scales) if zeros is None else ((8 - zeros.float()) * scales.float()).to(dtype)
    scales_and_zeros = torch.stack([scales, offset], dim=2).contiguous()  # (G, N, 2)
    if one.device.type == "cpu":
        tiled = torch.ops.aten._convert_weight_to_int4pack_for_cpu(one.to(torch.int32), 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = one[:, ::2] << 4 | one[:, 1::2]  # (N, K / 2): the even column in the high nibble
        tiled = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
        multiply = torch.ops.aten._weight_int4pack_mm
    copies = copies_for(packed.nbytes, cache)
    weights = [tiled.clone() for _ in range(copies)]
    return Prepared(lambda i, x: multiply(x, weights[i], group, scales_and_zeros), copies, most_rows=FEW_ROWS)


def naive_triton(packed: Packed, dtype: torch.dtype, cache: int) -> Prepared:
    """The simplest Triton kernel."""
    from bench import triton_naive

    weights, scales, zeros = _rows_of_words(packed, cache)
    group = packed.group
    return Prepared(
        lambda i, x: triton_naive.linear(x, weights[i], scales, zeros, group), len(weights), most_rows=FEW_ROWS
    )


def dequantize(packed: Packed, dtype: torch.dtype, cache: int) -> Prepared:
    """The whole weight dequantized to 16 bits in each call, then cuBLAS."""
    from bench import triton_naive

    weights, scales, zeros = _rows_of_words(packed, cache)
    group = packed.group
    buffer = torch.empty(packed.in_features, packed.words.shape[1], dtype=dtype, device=packed.words.device)
    return Prepared(
        lambda i, x: torch.mm(x, triton_naive.dequantize(weights[i], scales, zeros, group, buffer)), len(weights)
    )


def gemlite(packed: Packed, dtype: torch.dtype, cache: int) -> Prepared:
    """GemLite's layer with the configurations that it ships."""
    if importlib.util.find_spec("gemlite") is None:
        raise NotAvailableError("not installed")
    if packed.words.device.type == "cpu":
        raise NotAvailableError("needs a GPU")
    from gemlite.core import DType, GemLiteLinear

    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    zeros = packed.zeros_of(0)
    zero = torch.full_like(packed.scales[0], 8.0) if zeros is None else zeros.to(dtype)
    layers = []
    for _ in range(copies_for(packed.nbytes, cache)):
        layer = GemLiteLinear(
            4, group_size=packed.group, in_features=packed.in_features, out_features=packed.words.shape[1],
            input_dtype=kind, output_dtype=kind,
        )  # fmt: skip
        layer.pack(codes(packed), packed.scales[0].T.contiguous(), zero.T.contiguous(), None)
        layers.append(layer)
    return Prepared(lambda i, x: layers[i](x), len(layers))


def _rows_of_words(packed: Packed, cache: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(copies of qweight, scales, zeros) as `triton_naive` takes them."""
    from bench import triton_naive

    zeros = packed.zeros_of(0)
    if zeros is None:
        zeros = torch.full(packed.scales[0].shape, 8, dtype=torch.int16, device=packed.words.device)
    qweight = triton_naive.pack(codes(packed))
    return [qweight.clone() for _ in range(copies_for(packed.nbytes, cache))], packed.scales[0], zeros


ALL: Mapping[str, Maker] = {
    "cublas": cublas,
    "tinygemm": tinygemm,
    "naive_triton": naive_triton,
    "dequantize": dequantize,
    "gemlite": gemlite,
}
