"""Small batches on a CPU: torch's own int4 and int8 products, on a second copy of the codes.

For a few rows of x, as in decoding, these are several times faster than `cpu.py`, which writes every piece of W to
memory; for many rows they are slower, since they decode W again for every few of them.  A layer keeps the words of
`layout.py` and is saved from them.  A pair of arrays, `cpu_words` and `cpu_grid`, is added to them, for one process
(`int4pack.py`, `int8pack.py`).

**They compute in bfloat16 with float32 sums**: x, scales, shifts and y are rounded to bfloat16, by at most 2**-9 of
their value, whatever the dtype of x.  Relative to the definition the error is about 2e-3 to 3e-3, at most 4e-3: a few
percent of the error of 4-bit quantization, and a third of that of 8-bit quantization.  They are used only up to
`choose().rows` rows; above, results are those of `cpu.py`, exact in float32.  So evaluation, which reads long
sequences, is not affected, and generation is.

Which path is faster depends on the processor.  It is measured once per process and width, by timing both on one
synthetic weight.  The limit is one of a few fixed values and needs a margin, so that other load on the machine does not
change it, and with it the last digits of a run.  `LLMQ_CPU_INT4=on` and `off` decide for both without measuring.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from llmq_kernels.errors import KernelWarning
from llmq_kernels.w4a16 import cpu, int4pack, int8pack, layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

VARIABLE = "LLMQ_CPU_INT4"
SETTINGS = ("auto", "on", "off")
PRODUCTS: dict[int, ModuleType] = {4: int4pack, 8: int8pack}  # by the bits of the weight

LIMITS = (16, 4, 1)  # rows of x; `on` takes the first
MARGIN = 0.8  # of the time of `cpu.py`
TIMED_WEIGHT, ROUNDS = 1024, 7  # a weight of 1024 x 1024; a few milliseconds


@dataclass(frozen=True)
class Choice:
    """Up to `rows` rows of x use torch's op, 0 for none; `reason` explains it to a person."""

    rows: int
    reason: str


def choose(bits: int) -> Choice:
    """The choice of this process for weights of 4 or 8 bits; measured at the first call."""
    return _choose(os.environ.get(VARIABLE, "auto"), bits)


def describe(bits: int) -> str:
    """The choice in words, as `llmq env` prints it."""
    choice = choose(bits)
    use = f"up to {choice.rows} rows" if choice.rows else "not used"
    return f"torch's int{bits} product on CPU: {use} ({choice.reason})"


def prepare(weight: PackedWeight[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(cpu_words, cpu_grid) of a weight, or None where torch has no product for it, or a slower one."""
    own = PRODUCTS.get(weight.bits)
    if own is None or weight.words.device.type != "cpu" or weight.words.shape[0] == 0 or not choose(weight.bits).rows:
        return None
    pair: tuple[Tensor, Tensor] | None = own.pair(weight)
    return pair


def linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.linear` in bfloat16: x (..., K) -> (..., N) in x's dtype.

    `op.check` has checked the arguments, and the weight has been prepared.
    """
    words, grid, column_order = weight.cpu_words, weight.cpu_grid, weight.column_order
    assert words is not None and grid is not None
    rows = x.to(torch.bfloat16).reshape(-1, weight.in_features)  # a call into torch takes as long as many weights
    if column_order is not None:
        rows = rows.index_select(1, column_order)
    product = PRODUCTS[weight.bits].product(rows.contiguous(), words, grid).view(*x.shape[:-1], words.shape[0])
    if bias is not None:
        product = product.to(torch.float32) + bias
    y: Tensor = product.to(x.dtype, copy=True)  # never a view: autograd lets users write into it
    return y


@functools.cache
def _choose(setting: str, bits: int) -> Choice:
    if setting not in SETTINGS:
        message = f"{VARIABLE}={setting!r} is not one of {', '.join(SETTINGS)}; auto is used"
        warnings.warn(message, KernelWarning, stacklevel=3)
    if setting == "off":
        return Choice(0, f"{VARIABLE}=off")
    try:
        trial = Trial.make(bits)
        trial.small(torch.zeros(1, TIMED_WEIGHT))
        return Choice(LIMITS[0], f"{VARIABLE}=on") if setting == "on" else _fastest(trial)
    except (AttributeError, RuntimeError) as error:  # a torch without the op, or one that does not take these arguments
        return Choice(0, f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}")


@dataclass(frozen=True)
class Trial:
    """One synthetic weight for both paths; fixed, so that the choice depends on the processor only."""

    weight: PackedWeight[Tensor]

    @classmethod
    def make(cls, bits: int) -> "Trial":
        N = K = TIMED_WEIGHT
        codes = torch.arange(N * K, dtype=torch.int32).remainder_(13).view(N, K).to(torch.uint8)
        group = 128 if bits == 4 else K
        weight = PackedWeight(layout.pack(codes, bits), torch.full((K // group, N), 2.0**-6), None, bits, K, group)
        words, grid = PRODUCTS[bits].pair(weight)
        return cls(weight._replace(cpu_words=words, cpu_grid=grid))

    def small(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None)

    def pieces(self, x: Tensor) -> Tensor:
        return cpu.linear(x, self.weight, None)


def _fastest(trial: Trial) -> Choice:
    for rows in LIMITS:
        x = torch.full((rows, TIMED_WEIGHT), 0.5)
        small, pieces = best_seconds(partial(trial.small, x), partial(trial.pieces, x))
        if small <= MARGIN * pieces:
            return Choice(rows, f"measured: {pieces / small:.1f} times as fast as by pieces at {rows} rows")
    return Choice(0, f"measured: {small / pieces:.1f} times the time by pieces at 1 row")


def best_seconds(*candidates: Callable[[], Tensor]) -> list[float]:
    """The fastest of a few calls of each candidate, in turns: other load on the machine can only add time."""
    best = [float("inf")] * len(candidates)
    for _ in range(ROUNDS):
        for i, call in enumerate(candidates):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
