"""Small batches on a CPU: torch's own int4 product, on a second copy of the codes.

torch has a vectorized y = x Wᵀ with W[n, k] = scale * (code - 8) + shift in 4 bits, which never writes W to memory.
For a few rows of x, as in decoding, it is several times faster than `cpu.py`, which writes every piece of W to memory;
for many rows it is slower, since it decodes W again for every four of them.  Its layout depends on the instruction set
of the processor, so a layer keeps the words of `layout.py` and is saved from them.  This pair is added to them, for one
process:

    int4_words  (N, K / 2) uint8           opaque
    int4_grid   (K / group, N, 2) bfloat16   [..., 0] scale, [..., 1] shift = (8 - zero) * scale

**It computes in bfloat16 with float32 sums**: x, scales, shifts and y are rounded to bfloat16, by at most 2**-9 of
their value, whatever the dtype of x.  Relative to the definition the error is about 2e-3, at most 4e-3: a few percent
of the error of 4-bit quantization.  It is used only up to `choose().rows` rows; above, results are those of `cpu.py`,
exact in float32.  So evaluation, which reads long sequences, is not affected, and generation is.

Which path is faster depends on the processor.  It is measured once per process, by timing both on one synthetic weight.
The limit is one of a few fixed values and needs a margin, so that other load on the machine does not change it, and
with it the last digits of a run.  `LLMQ_CPU_INT4=on` and `off` decide without measuring.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmq_kernels.errors import KernelWarning
from llmq_kernels.w4a16 import cpu, layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

VARIABLE = "LLMQ_CPU_INT4"
SETTINGS = ("auto", "on", "off")

GROUPS = (256, 128, 64, 32)  # columns that may share a scale, as torch's op checks
ROWS_OF_LAYOUT = 16  # N must be a multiple of it
ROWS_AT_ONCE = 512  # of W, in packing: a multiple of every block of rows that the op's layouts have (32, 64)

LIMITS = (16, 4, 1)  # rows of x; `on` takes the first
MARGIN = 0.8  # of the time of `cpu.py`
TIMED_WEIGHT, ROUNDS = 1024, 7  # a weight of 1024 x 1024; a few milliseconds


@dataclass(frozen=True)
class Choice:
    """Up to `rows` rows of x use torch's op, 0 for none; `reason` explains it to a person."""

    rows: int
    reason: str


def choose() -> Choice:
    """The choice of this process; measured at the first call."""
    return _choose(os.environ.get(VARIABLE, "auto"))


def describe() -> str:
    """The choice in words, as `llmq env` prints it."""
    choice = choose()
    use = f"up to {choice.rows} rows" if choice.rows else "not used"
    return f"torch's int4 product on CPU: {use} ({choice.reason})"


def prepare(weight: PackedWeight[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(int4_words, int4_grid) of a weight, or None where torch's op cannot represent it.

    It needs 4 bits on a CPU, N a multiple of 16, groups of a multiple of 32 columns that divide K, and zero points in
    [0, 16]: a larger shift in bfloat16 would leave no precision for the code.
    """
    words, scales, zeros, bits, in_features, columns_per_group, *_ = weight
    N, group = words.shape[0], _group(in_features, columns_per_group, single=scales.shape[0] == 1)
    if bits != 4 or words.device.type != "cpu" or N == 0 or N % ROWS_OF_LAYOUT or group is None or not choose().rows:
        return None
    if zeros is not None and bool(((zeros < 0) | (zeros > 16)).any()):
        return None
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(layout.unpack(piece, 4, in_features).to(torch.int32), 1)
        for piece in torch.split(words, ROWS_AT_ONCE)
    ]
    scale = scales.to(torch.float32)  # (G, N)
    shift = torch.zeros_like(scale) if zeros is None else (8 - zeros) * scale
    pieces = in_features // group  # each group is divided into pieces of a size that the op knows
    grid = torch.stack([scale, shift], dim=2).to(torch.bfloat16)  # (G, N, 2)
    repeated = grid.repeat_interleave(max(1, min(columns_per_group, in_features) // group), dim=0)[:pieces]
    return torch.cat(packed), repeated.contiguous()


def linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.linear` in bfloat16: x (..., K) -> (..., N) in x's dtype.

    `op.check` has checked the arguments, and the weight has been prepared.
    """
    K, _, column_order, int4_words, int4_grid = weight[4:]
    assert int4_words is not None and int4_grid is not None
    rows = x.to(torch.bfloat16).reshape(-1, K)  # (M, K); a call into torch takes as long as thousands of weights
    if column_order is not None:
        rows = rows.index_select(1, column_order)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows.contiguous(), int4_words, K // int4_grid.shape[0], int4_grid
    ).view(*x.shape[:-1], int4_words.shape[0])
    if bias is not None:
        product = product.to(torch.float32) + bias
    y: Tensor = product.to(x.dtype, copy=True)  # never a view: autograd lets users write into it
    return y


def _group(in_features: int, columns_per_group: int, *, single: bool) -> int | None:
    """The widest run of columns that torch's op knows and that has no group boundary inside."""
    for group in GROUPS:
        if in_features % group == 0 and (single or columns_per_group % group == 0):
            return group
    return None


@functools.cache
def _choose(setting: str) -> Choice:
    if setting not in SETTINGS:
        message = f"{VARIABLE}={setting!r} is not one of {', '.join(SETTINGS)}; auto is used"
        warnings.warn(message, KernelWarning, stacklevel=3)
    if setting == "off":
        return Choice(0, f"{VARIABLE}=off")
    try:
        trial = Trial.make()
        trial.int4(torch.zeros(1, TIMED_WEIGHT))
        return Choice(LIMITS[0], f"{VARIABLE}=on") if setting == "on" else _fastest(trial)
    except (AttributeError, RuntimeError) as error:  # a torch without the op, or one that does not take these arguments
        return Choice(0, f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}")


@dataclass(frozen=True)
class Trial:
    """One synthetic weight for both paths; fixed, so that the choice depends on the processor only."""

    weight: PackedWeight[Tensor]

    @classmethod
    def make(cls) -> "Trial":
        N = K = TIMED_WEIGHT
        codes = torch.arange(N * K, dtype=torch.int32).remainder_(13).view(N, K)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.full((K // 128, N), 2.0**-6)
        grid = torch.stack([scales, torch.zeros_like(scales)], dim=2).to(torch.bfloat16)
        words = layout.pack(codes.to(torch.uint8), 4)
        return cls(PackedWeight(words, scales, None, 4, K, 128, int4_words=packed, int4_grid=grid))

    def int4(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None)

    def pieces(self, x: Tensor) -> Tensor:
        return cpu.linear(x, self.weight, None)


def _fastest(trial: Trial) -> Choice:
    for rows in LIMITS:
        x = torch.full((rows, TIMED_WEIGHT), 0.5)
        int4, pieces = _best_seconds(partial(trial.int4, x), partial(trial.pieces, x))
        if int4 <= MARGIN * pieces:
            return Choice(rows, f"measured: {pieces / int4:.1f} times as fast as by pieces at {rows} rows")
    return Choice(0, f"measured: {int4 / pieces:.1f} times the time by pieces at 1 row")


def _best_seconds(*candidates: Callable[[], Tensor]) -> list[float]:
    """The fastest of a few calls of each candidate, in turns: other load on the machine can only add time."""
    best = [float("inf")] * len(candidates)
    for _ in range(ROUNDS):
        for i, call in enumerate(candidates):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
