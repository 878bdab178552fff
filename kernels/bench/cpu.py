"""The packed product on this machine's CPU against float32 and against dequantizing the weight in every call.

    PYTHONPATH=.:kernels python -m bench.cpu [--bits 8] --out kernels/bench/results/cpu-DATE.json

For each size and number of rows, in one run and in turns: torch's float32 linear on a float weight; the packed layer as
a model runs it; the same without its copy for small batches, by pieces; and, for comparison with the pieces, the whole
weight dequantized and then multiplied.  Every contender cycles through enough copies of its weight that none is in the
cache at its next call.  The ratios matter: other load on the machine affects all contenders.
"""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.environment import machine
from bench.timing import Contender, Spread, interleaved
from llmq_kernels.w4a16 import layout, op, small_batches
from llmq_kernels.w4a16.packed_weight import PackedWeight

SIZES = (1024, 4096)
ROWS = (1, 4, 16, 64, 256, 1024)
GROUP = 128
BEYOND_CACHE = 96 << 20  # bytes of all copies of a weight together, three times a large L3 slice
SECONDS = 0.4  # per contender and case
FEWEST, MOST = 5, 101  # replays
FLOAT, PACKED, PIECES, WHOLE = "torch fp32", "llmq", "llmq by pieces", "dequantize, then torch"
COLUMNS = ("N x K", "M", FLOAT, PACKED, PIECES, WHOLE, f"{PACKED} / {FLOAT}", f"{PIECES} / {WHOLE}")


class Weights:
    """Copies of random symmetric weights (N, K) in 4 bits, g128, or in 8, and of float ones of the same size."""

    def __init__(self, N: int, K: int, bits: int) -> None:
        self.N, self.K, self.bits = N, K, bits
        self.group = GROUP if bits == 4 else K
        copies = max(2, BEYOND_CACHE // (N * K * bits // 8))
        self.scales = torch.rand(K // self.group, N) * 0.01
        width = K * bits // 16
        words = [torch.randint(-(1 << 15), 1 << 15, (N, width), dtype=torch.int16) for _ in range(copies)]
        self.plain = [PackedWeight(copy, self.scales, None, bits, K, self.group) for copy in words]
        pairs = [small_batches.prepare(weight) or (None, None) for weight in self.plain]
        self.packed = [
            weight._replace(cpu_words=codes, cpu_grid=grid)
            for weight, (codes, grid) in zip(self.plain, pairs, strict=True)
        ]
        self.floats = [torch.randn(N, K) for _ in range(max(2, BEYOND_CACHE // (4 * N * K)))]

    def contenders(self, x: Tensor) -> dict[str, Contender]:
        """By name; x (M, K) float32."""
        return {
            FLOAT: Contender(lambda i: F.linear(x, self.floats[i]), len(self.floats)),
            PACKED: Contender(lambda i: op.linear(x, self.packed[i], None), len(self.packed)),
            PIECES: Contender(lambda i: op.linear(x, self.plain[i], None), len(self.plain)),
            WHOLE: Contender(partial(self.whole, x), len(self.plain)),
        }

    def whole(self, x: Tensor, i: int) -> Tensor:
        codes = layout.unpack(self.plain[i].words, self.bits, self.K).to(torch.float32).sub_(1 << (self.bits - 1))
        groups = codes.view(self.N, -1, self.group).mul_(self.scales.t().unsqueeze(2))  # (N, G, 128)
        return F.linear(x, groups.view(self.N, self.K))


def measure(size: int, rows: Iterable[int], bits: int) -> list[dict[str, Any]]:
    """One case for each number of rows."""
    weights, cases = Weights(size, size, bits), []
    for M in rows:
        x = torch.randn(M, size)
        contenders = weights.contenders(x)
        once, _ = interleaved(contenders, calls=1, replays=1, device=x.device)
        slowest = max(spread.median for spread in once.values())
        replays = int(min(MOST, max(FEWEST, SECONDS / slowest)))
        taken, failed = interleaved(_turned(contenders), calls=1, replays=replays, device=x.device)
        if failed:
            raise RuntimeError(f"{size} x {size}, {M} rows: {failed}")
        cases.append({"N": size, "K": size, "M": M, "replays": replays, **_figures(taken)})
        print("  ".join(f"{cell:>16}" for cell in cells(cases[-1])), flush=True)
    return cases


def _turned(contenders: dict[str, Contender]) -> dict[str, Contender]:
    """The same contenders, each using its next copy in every call, for any number of calls per replay."""

    def turning(contender: Contender) -> Contender:
        calls = iter(range(1 << 62))
        return Contender(lambda _: contender.call(next(calls) % contender.copies), 1)

    return {name: turning(contender) for name, contender in contenders.items()}


def _figures(taken: dict[str, Spread]) -> dict[str, Any]:
    median = {name: spread.median for name, spread in taken.items()}
    ratios = {"packed_to_float": median[PACKED] / median[FLOAT], "pieces_to_whole": median[PIECES] / median[WHOLE]}
    return {
        "microseconds": {name: spread.microseconds() for name, spread in taken.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def cells(case: dict[str, Any]) -> list[str]:
    taken = [f"{case['microseconds'][name]['median']:.0f} µs" for name in (FLOAT, PACKED, PIECES, WHOLE)]
    return [f"{case['N']} x {case['K']}", str(case["M"]), *taken, *(f"{r:.2f}" for r in case["ratios"].values())]


def stamp(note: str, bits: int) -> dict[str, Any]:
    """Date, hardware and software; `note` describes other load on the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _model_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "bits": bits,
        "choice": small_batches.describe(bits),
        "note": note,
        **{name: value for name, value in machine(torch.device("cpu")).items() if name not in ("name", "summary")},
    }


def _model_name() -> str:
    """The name of the processor, where Linux reports it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--bits", type=int, choices=small_batches.PRODUCTS, default=4)
    parser.add_argument("--note", default="", help="other load on the machine, for the record")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("  ".join(f"{column:>16}" for column in COLUMNS))
    with torch.inference_mode():
        cases = [case for size in arguments.sizes for case in measure(size, arguments.rows, arguments.bits)]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**stamp(arguments.note, arguments.bits), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
