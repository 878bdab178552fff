"""The product on a GPU: which kernel for how many rows, its workspaces, and the launch.

    rows M                   what runs
    0                        nothing
    up to the crossover      one launch of `triton_kernel.fused4` (4 bits) or `fused_planes` (2, 3, 8 bits)
    above                    W is dequantized in chunks (`chunks.py`), each multiplied by cuBLAS

For few rows the time is that of reading the codes; for many, that of the tensor cores, which cuBLAS keeps busier than a
kernel that also unpacks.  Tile sizes and the crossover come from `configs.py`.  No value is read and nothing
synchronizes with the GPU; for shapes seen before, finding the launch is one dictionary lookup.

The crossover of a table is for 4 bits; other widths use cuBLAS above PLAIN_ROWS.

Triton compiles a kernel again for arguments whose alignment differs, which takes seconds, and fails while a CUDA graph
is captured.  So rows of x that are not aligned like those of a new tensor are copied first.

Not covered here, and computed by `cpu.linear` (torch, on any device): float32 x, 5 to 7 bits, groups that are neither
a multiple of 32 columns nor the whole row, and weights of 2**31 words.

**Memory.**  Outputs and workspaces come from PyTorch's allocator, which gives a block to one stream at a time and to
a CUDA graph from the graph's own memory, so streams and captured graphs never share one; neither needs zeroing.
Counters do, see `counters.py`.  Results have the same bits on every run: sums have a fixed order (see
`triton_kernel.py`), and above the crossover cuBLAS is deterministic on one GPU and version.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq_kernels.w4a16 import chunks, configs, counters, cpu
from llmq_kernels.w4a16.layout import TILE
from llmq_kernels.w4a16.packed_weight import PackedWeight

WIDTHS = (2, 3, 4, 8)  # bits that the kernels unpack
PLAIN_ROWS = 64
DEQUANTIZED_ROWS = 32  # of W, per program
GRADIENT_BYTES = 1 << 28  # of dequantized weight at a time in the backward pass
ALIGNMENT = 16  # what Triton distinguishes: bytes of addresses, elements of strides
INDEX_LIMIT = 2**31


@dataclass(frozen=True, eq=False)  # compared by identity, so that hashing it is cheap
class Machine:
    """What launches depend on besides their arguments; `assembly` is false in Triton's interpreter."""

    table: configs.Table
    processors: int
    assembly: bool


class Product(NamedTuple):
    """What the launch of x (M, K) times W (N, K) depends on; `planes` as in `PackedWeight.planes`."""

    bits: int
    M: int
    N: int
    K: int
    planes: int
    has_zeros: bool
    has_bias: bool

    @classmethod
    def of(cls, M: int, weight: PackedWeight[Tensor], bias: Tensor | None) -> "Product":
        N, K = weight.words.shape[0], weight.in_features
        return cls(weight.bits, M, N, K, weight.planes, weight.zeros is not None, bias is not None)


@dataclass(frozen=True)
class Plan:
    """One launch of a fused kernel: everything but tensors and sizes."""

    kernel: Any  # a Triton function
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    splits: int
    output_tiles: int


def linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.linear` on x's device: x (..., K) -> (..., N) in x's dtype.  `op.check` has checked the arguments."""
    return linear_on(machine_of(x.device), x, weight, bias)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """What `device` is; for a CPU, Triton's interpreter with the table of compute capability 8.0."""
    if device.type != "cuda":
        return Machine(configs.for_architecture(80), 2, assembly=False)
    properties = torch.cuda.get_device_properties(device)
    table = configs.for_architecture(properties.major * 10 + properties.minor)
    return Machine(table, properties.multi_processor_count, assembly=True)


def linear_on(machine: Machine, x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`linear` with the table of `machine`."""
    N, K = weight.words.shape[0], weight.in_features
    if not covers(x.dtype, weight):
        return cpu.linear(x, weight, bias)
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(x.device):
            return linear_on(machine, x, weight, bias)
    rows = x.reshape(-1, K)  # (M, K)
    M = rows.shape[0]
    output = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)  # not a view: autograd lets users write it
    out = output.view(M, N)
    if M and N:
        if weight.column_order is not None:
            rows = rows.index_select(1, weight.column_order)
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        if M <= most_fused_rows(machine, weight):
            run_fused(cached_plan(machine, Product.of(M, weight, bias)), aligned(rows), weight, bias, out)
        else:
            run_dequantized(machine, rows, weight, bias, out)
    return output


def input_gradient(gradient: Tensor, weight: PackedWeight[Tensor]) -> Tensor:
    """`cpu.input_gradient` with W dequantized to the dtype of `gradient` (..., N) -> (..., K), and products by cuBLAS.

    Chunks of W are as large as GRADIENT_BYTES; for most weights there is one.  Products of several chunks are each
    rounded to that dtype, and summed in float32.
    """
    N, K = weight.words.shape[0], weight.in_features
    if not covers(gradient.dtype, weight) or gradient.numel() == 0:
        return cpu.input_gradient(gradient, weight)
    Y = gradient.reshape(-1, N)  # (M, N)
    rows = min(N, max(1, GRADIENT_BYTES // (K * Y.element_size())))
    W = torch.empty(rows, K, dtype=Y.dtype, device=Y.device)
    total: Tensor | None = None  # (M, K)
    with torch.cuda.device_of(gradient):  # Triton launches on the current device
        for start in range(0, N, rows):
            piece = W[: min(rows, N - start)]
            dequantize(weight, piece, start)
            product = Y[:, start : start + rows] @ piece
            total = product if total is None else total.float().add_(product)
    assert total is not None  # N > 0
    if weight.column_order is not None:
        total = torch.zeros_like(total).index_add_(1, weight.column_order, total)
    return total.to(gradient.dtype).view(*gradient.shape[:-1], K)


def most_fused_rows(machine: Machine, weight: PackedWeight[Tensor]) -> int:
    """Up to this many rows of x, a fused kernel runs."""
    return machine.table.crossover if weight.bits == 4 else PLAIN_ROWS


def aligned(rows: Tensor) -> Tensor:
    """rows (M, K) of contiguous columns, copied if their addresses are not aligned like those of a new tensor."""
    M, K = rows.shape
    strides_differ = M > 1 and (rows.stride(0) % ALIGNMENT == 0) != (K % ALIGNMENT == 0)
    if rows.data_ptr() % ALIGNMENT or strides_differ or M * rows.stride(0) >= INDEX_LIMIT:
        return rows.clone(memory_format=torch.contiguous_format)  # not `contiguous`, which may return the same memory
    return rows


def covers(dtype: torch.dtype, weight: PackedWeight[Tensor]) -> bool:
    """Whether the kernels can run it; `cpu.linear` can run everything."""
    grouped = weight.columns_per_group % 32 == 0 or weight.columns_per_group >= weight.in_features
    return weight.bits in WIDTHS and dtype != torch.float32 and grouped and weight.words.numel() < INDEX_LIMIT


@functools.lru_cache(maxsize=1 << 14)
def cached_plan(machine: Machine, product: Product) -> Plan:
    """The launch of the configuration in the machine's table."""
    return plan(machine.table.config(product.M, product.N, product.K), machine, product)


def plan(config: configs.Config, machine: Machine, product: Product) -> Plan:
    """The launch of `config` for this product."""
    from llmq_kernels.w4a16 import triton_kernel

    bits, M, N, K, planes, has_zeros, has_bias = product
    splits = config.splits(M, N, K, machine.processors)
    grid = (-(-M // config.block_m), -(-N // config.block_n), splits)
    constants: dict[str, Any] = {
        "PLANES": planes, "HAS_ZEROS": has_zeros, "HAS_BIAS": has_bias, "EVEN_K": K % TILE == 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLITS": splits, "STAGES": config.stages,
    }  # fmt: skip
    if bits == 4:
        constants["SCALE_AFTER"] = config.scale == "after"
        constants["ASSEMBLY"] = machine.assembly
        constants["PREFETCH"] = config.prefetch and machine.assembly
    else:
        constants["BITS"] = bits
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    kernel = triton_kernel.fused4 if bits == 4 else triton_kernel.fused_planes
    return Plan(kernel, grid, constants | options, splits, grid[0] * grid[1])


def run_fused(
    plan: Plan,
    rows: Tensor,
    weight: PackedWeight[Tensor],
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None = None,
    counts: Tensor | None = None,
) -> Any:
    """rows (M, K) of contiguous columns -> out (M, N), contiguous; returns the compiled kernel.

    workspace (splits, M, N) float32 and counts (output tiles,) int32, all zero, are made where they are not given.
    """
    M, K = rows.shape
    N = out.shape[1]
    if plan.splits > 1:
        if workspace is None:
            workspace = torch.empty(plan.splits, M, N, dtype=torch.float32, device=rows.device)
        if counts is None:
            counts = counters.zeroed(plan.output_tiles, rows.device)
    words, zeros = weight.words, weight.zeros
    stride = rows.stride(0) if M > 1 else K  # of one row any stride is right: the one that is compiled
    return plan.kernel[plan.grid](  # where there is no tensor, one that the kernel does not read takes its place
        rows, words, weight.scales, words if zeros is None else zeros, out if bias is None else bias, out,
        out if workspace is None else workspace, words if counts is None else counts,
        M, N, K, stride, **plan.constants,
    )  # fmt: skip


def run_dequantized(
    machine: Machine, rows: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """rows (M, K) times W, in chunks of rows of W, each rounded to x's dtype -> out (M, N)."""
    M, K = rows.shape
    N = out.shape[1]
    chunk = chunks.rows_per_chunk(M, N, K * rows.element_size(), machine.processors, machine.table.chunk_bytes)
    W = torch.empty(chunk, K, dtype=rows.dtype, device=rows.device)
    for start in range(0, N, chunk):
        n = slice(start, min(start + chunk, N))
        piece = W[: n.stop - start]
        dequantize(weight, piece, start)
        if bias is None:
            torch.mm(rows, piece.t(), out=out[:, n])
        else:
            torch.addmm(bias[n].to(rows.dtype), rows, piece.t(), out=out[:, n])


def dequantize(weight: PackedWeight[Tensor], out: Tensor, first_row: int) -> None:
    """Rows first_row, ... of W -> out (R, K) float16, bfloat16 or float32, contiguous."""
    from llmq_kernels.w4a16 import triton_kernel

    (R, K), words, zeros = out.shape, weight.words, weight.zeros
    triton_kernel.dequantize[(-(-R // DEQUANTIZED_ROWS), -(-K // TILE))](
        words, weight.scales, words if zeros is None else zeros, out, first_row, R, words.shape[0], K,
        PLANES=weight.planes, HAS_ZEROS=zeros is not None, BITS=weight.bits, BLOCK_N=DEQUANTIZED_ROWS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
