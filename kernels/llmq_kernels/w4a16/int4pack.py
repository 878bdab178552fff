"""Few rows of x on a CPU: torch's own int4 product, on a second copy of the codes.

torch has a vectorised y = x Wᵀ with W[n, k] = scale * (code - 8) + shift in 4 bits, which never writes W to memory.
For a few rows, as in decoding, that is several times quicker than `cpu.py`, which writes out every piece of W; for many
rows it is slower, since it decodes W again for each four of them.  It has a layout of its own that depends on the
processor's instruction set, so the words of `layout.py` stay what a layer is made of and saved from.  This pair beside
them is for one process:

    int4_words  (N, K / 2) uint8           opaque
    int4_grid   (K / group, N, 2) bfloat16   [..., 0] scale, [..., 1] shift = (8 - zero) * scale

**It is bfloat16 arithmetic with float32 sums**: x, scales, shifts and y are rounded to bfloat16, 2**-9 of each at
most, whatever the dtype of x.  Against the definition that is about 2e-3 relative error, 4e-3 at worst: a few percent
of what 4 bits cost.  It happens only up to `choose().rows` rows; beyond, results are `cpu.py`'s, exact in float32.  So
the evaluation of a model, which reads long windows of text, is not touched, and the next token is.

Which path is quicker is a question to the processor, asked once in a process, by timing both on one made-up weight.
The limit is a rung of a ladder and has to be passed by a margin, so that a busy moment does not change it, and with it
the last digits of a run.  `LLMQ_CPU_INT4=on` and `off` decide without asking.
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

VARIABLE = "LLMQ_CPU_INT4"
ASKED = ("auto", "on", "off")

GROUPS = (256, 128, 64, 32)  # columns that may share a scale, in the words of the op's checks
ROWS_OF_LAYOUT = 16  # N has to be a multiple
ROWS_AT_ONCE = 512  # of W, in packing: a multiple of every block of rows that the op's layouts have (32, 64)

LADDER = (16, 4, 1)  # rows of x, the limit that `on` sets first
MARGIN = 0.8  # of the other path's time
TIMED_WEIGHT, ROUNDS = 1024, 7  # a weight of 1024 x 1024; a few milliseconds


@dataclass(frozen=True)
class Choice:
    """Up to `rows` rows of x go through torch's op, none where 0; `reason` is half a sentence for a person."""

    rows: int
    reason: str


def choose() -> Choice:
    """What this process does; asks the processor at the first call."""
    return _choose(os.environ.get(VARIABLE, "auto"))


def describe() -> str:
    """The choice in words, as `llmq env` prints it."""
    choice = choose()
    use = f"up to {choice.rows} rows" if choice.rows else "not used"
    return f"torch's int4 product on CPU: {use} ({choice.reason})"


def prepare(
    words: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, in_features: int, columns_per_group: int
) -> tuple[Tensor, Tensor] | None:
    """(int4_words, int4_grid) of a weight as `op.w4a16_linear` takes it, or None where torch's op cannot hold it.

    Needed are 4 bits on a CPU, N a multiple of 16, groups of a multiple of 32 columns that fill K, and zeros among the
    codes or one past them: a far shift in bfloat16 would drown the code.
    """
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
    pieces = in_features // group  # each group is cut into pieces that the op knows
    grid = torch.stack([scale, shift], dim=2).to(torch.bfloat16)  # (G, N, 2)
    repeated = grid.repeat_interleave(max(1, min(columns_per_group, in_features) // group), dim=0)[:pieces]
    return torch.cat(packed), repeated.contiguous()


def linear(
    x: Tensor, bias: Tensor | None, column_order: Tensor | None, int4_words: Tensor, int4_grid: Tensor
) -> Tensor:
    """`reference.linear` in bfloat16: x (..., K) -> (..., N) in x's dtype.  `op.check` has seen the arguments."""
    K = x.shape[-1]
    rows = x.to(torch.bfloat16).reshape(-1, K)  # (M, K); each call into torch costs what thousands of weights do
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
    """The widest run of columns that torch's op knows and that no group boundary cuts."""
    for group in GROUPS:
        if in_features % group == 0 and (single or columns_per_group % group == 0):
            return group
    return None


@functools.cache
def _choose(asked: str) -> Choice:
    if asked not in ASKED:
        message = f"{VARIABLE}={asked!r} is not one of {', '.join(ASKED)}; auto is used"
        warnings.warn(message, KernelWarning, stacklevel=3)
    if asked == "off":
        return Choice(0, f"{VARIABLE}=off")
    try:
        trial = Trial.make()
        trial.int4(torch.zeros(1, TIMED_WEIGHT))
        return Choice(LADDER[0], f"{VARIABLE}=on") if asked == "on" else _fastest(trial)
    except (AttributeError, RuntimeError) as error:  # a torch without the op, or one that does not take these arguments
        return Choice(0, f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}")


@dataclass(frozen=True)
class Trial:
    """One made-up weight, ready for both paths; fixed, for the choice should depend on nothing but the processor."""

    words: Tensor
    scales: Tensor
    int4_words: Tensor
    int4_grid: Tensor

    @classmethod
    def make(cls) -> "Trial":
        N = K = TIMED_WEIGHT
        codes = torch.arange(N * K, dtype=torch.int32).remainder_(13).view(N, K)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.full((K // 128, N), 2.0**-6)
        grid = torch.stack([scales, torch.zeros_like(scales)], dim=2).to(torch.bfloat16)
        return cls(layout.pack(codes.to(torch.uint8), 4), scales, packed, grid)

    def int4(self, x: Tensor) -> Tensor:
        return linear(x, None, None, self.int4_words, self.int4_grid)

    def pieces(self, x: Tensor) -> Tensor:
        return cpu.linear(
            x, self.words, self.scales, None, None, None, bits=4, in_features=x.shape[1], columns_per_group=128
        )


def _fastest(trial: Trial) -> Choice:
    for rows in LADDER:
        x = torch.full((rows, TIMED_WEIGHT), 0.5)
        int4, pieces = _best_seconds(partial(trial.int4, x), partial(trial.pieces, x))
        if int4 <= MARGIN * pieces:
            return Choice(rows, f"measured: {pieces / int4:.1f} times as quick as by pieces at {rows} rows")
    return Choice(0, f"measured: {int4 / pieces:.1f} times the time by pieces at 1 row")


def _best_seconds(*candidates: Callable[[], Tensor]) -> list[float]:
    """The quickest of a few calls of each, taken in turns: what else the machine does only ever adds."""
    best = [float("inf")] * len(candidates)
    for _ in range(ROUNDS):
        for i, call in enumerate(candidates):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
