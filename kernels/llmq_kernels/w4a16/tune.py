"""Find tile sizes on the GPU at hand, and write them as a table of `configs.py`.

    python -m llmq_kernels.w4a16.tune --output my_gpu.json --shapes 6144x4096 4096x4096 28672x4096 4096x14336
    LLMQ_W4A16_CONFIGS=my_gpu.json llmq generate ...

For every shape (out_features x in_features) and number of rows, the search starts from the current configuration and
some other promising ones, and changes one field at a time, keeping what is faster.  Weights are symmetric, as llmq
writes them by default.  Times are those of a cold cache, as in a model, where a layer's
weight was last read one token ago: calls rotate through copies of the weight that together hold three times the L2
cache, in one CUDA graph; the figure is the median of its replays.  A candidate that does not compile, does not fit or
is wrong is left out and reported.

Above some number of rows, dequantizing and cuBLAS are faster; that is measured too, and becomes the table's crossover.
"""

import argparse
import datetime
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq_kernels.w4a16 import configs, gpu, layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")  # qkv, o, gate and up, down of an 8B Llama
CALLS, REPLAYS = 20, 30
L2_TIMES = 3
WORST_ERROR = 1e-2  # relative L2 against the dequantized weight in float32; bfloat16 rounds to 4e-3

Seconds = Callable[[configs.Config], float | None]


@dataclass(frozen=True)
class Timed:
    """What one configuration takes for one call."""

    config: configs.Config
    seconds: float


def variants(config: configs.Config, rows: int) -> list[list[dict[str, Any]]]:
    """Changes to try, one list per field; fields that belong together change together."""
    blocks = [8, 16, 32, 64, 128, 256]
    enough = next((block for block in blocks if block >= rows), blocks[-1])  # the smallest that holds all rows
    return [
        [{"ctas_per_sm": value} for value in (0, 1, 2, 3, 4, 6, 8)],
        [{"block_n": features, "warps": warps} for features, warps in ((32, 2), (64, 4), (128, 4), (128, 8))],
        [{"stages": value} for value in (2, 3, 4, 5, 6)],
        [{"block_m": block} for block in blocks if max(8, enough // 4) <= block <= enough],
        [{"scale": "after", "prefetch": True}, {"scale": "after", "prefetch": False}]
        + [{"scale": "before", "prefetch": False}] * (rows > 16),
    ]


def seeds(config: configs.Config, rows: int) -> list[dict[str, Any]]:
    """Changes to try first, of several fields at once: the search, one field at a time, might not arrive there."""
    if rows <= 16:  # fewer instructions per weight
        return [{"block_n": 128, "warps": 4, "stages": 4, "ctas_per_sm": 3}]
    if rows <= 64:  # two and four programs per multiprocessor
        return [{"stages": stages, "ctas_per_sm": 2} for stages in (3, 4)]
    small: dict[str, Any] = {"block_n": 64, "warps": 4, "stages": 3, "scale": "before", "prefetch": False}
    return [{"block_m": 128, "ctas_per_sm": ctas, **small} for ctas in (0, 1, 2)]  # two programs per multiprocessor


def search(start: configs.Config, rows: int, seconds: Seconds, deadline: float) -> Timed | None:
    """The fastest that one pass over the fields finds from the best of `start` and `seeds`; None if nothing ran."""
    best: Timed | None = None
    tried: set[configs.Config] = set()
    nothing: list[dict[str, Any]] = [{}]
    for changes in [nothing, seeds(start, rows), *variants(start, rows)]:
        basis = start if best is None else best.config
        for change in changes:
            config = replace(basis, **change)
            if config in tried or time.monotonic() > deadline:
                continue
            tried.add(config)
            taken = seconds(config)
            if taken is not None and (best is None or taken < best.seconds):
                best = Timed(config, taken)
    return best


class Case:
    """One weight, in enough copies to exceed the L2 cache, and rows to multiply."""

    def __init__(
        self, N: int, K: int, group: int, dtype: torch.dtype, device: torch.device, *, asymmetric: bool = False
    ) -> None:
        self.N, self.K, self.machine = N, K, gpu.machine_of(device)
        G = -(-K // group)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = math.ceil(L2_TIMES * cache / (N * K // 2)) + 1
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
        words = [layout.pack(codes, 4).clone() for _ in range(copies)]
        scales = torch.rand(G, N, device=device).add_(0.5).mul_(0.01).to(dtype)
        zeros = torch.randint(0, 16, (G, N), dtype=torch.int16, device=device) if asymmetric else None
        self.weights = [PackedWeight(copy, scales, zeros, 4, K, group) for copy in words]
        self.dtype, self.device = dtype, device

    def rows(self, M: int) -> Tensor:
        return torch.randn(M, self.K, dtype=self.dtype, device=self.device)

    def fused(self, M: int, config: configs.Config) -> float | None:
        """Seconds of one call, or None, with the reason on stderr, where the configuration cannot be used."""
        X, out = self.rows(M), torch.empty(M, self.N, dtype=self.dtype, device=self.device)
        plan = gpu.plan(config, self.machine, gpu.Product.of(M, self.weights[0], None))

        # Separate counters: captured launches keep theirs, and a search would use up all of the shared ones.
        counts = torch.zeros(plan.output_tiles, dtype=torch.int32, device=self.device) if plan.splits > 1 else None

        def call(index: int) -> None:
            gpu.run_fused(plan, X, self.weights[index % len(self.weights)], None, out, counts=counts)

        try:
            call(0)
            expected = torch.empty_like(out)
            gpu.run_dequantized(self.machine, X, self.weights[0], None, expected)
            difference = float((out.float() - expected.float()).norm() / expected.float().norm())
            if not difference < WORST_ERROR:
                raise ArithmeticError(f"wrong by {difference:.1e}")
            return self.seconds(call)
        except Exception as error:  # compilers and drivers raise different errors for each limit
            print(f"  left out: {config}: {str(error).splitlines()[:1]}", file=sys.stderr)
            return None

    def dequantized(self, M: int) -> float:
        X, out = self.rows(M), torch.empty(M, self.N, dtype=self.dtype, device=self.device)

        def call(index: int) -> None:
            gpu.run_dequantized(self.machine, X, self.weights[index % len(self.weights)], None, out)

        return self.seconds(call)

    def seconds(self, call: Callable[[int], None]) -> float:
        """Seconds per call: the median over replays of a graph of at least CALLS calls."""
        calls = max(CALLS, len(self.weights))
        call(0)  # compiles, and allocates what a capture must not
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(calls):
                call(index)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        taken = []
        for _ in range(REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(float(begin.elapsed_time(end)) / 1000 / calls)
        return statistics.median(taken)


def crossover(fused: Sequence[tuple[int, float]], dequantized: Sequence[tuple[int, float]]) -> int:
    """The most rows up to which the fused kernel is nowhere slower, from (rows, seconds) in ascending rows."""
    last = 0
    for (rows, ours), (_, theirs) in zip(fused, dequantized, strict=True):
        if ours > theirs:
            break
        last = rows
    return last


def table(timed: dict[str, dict[int, Timed]], most_rows: int, chunk_bytes: int) -> dict[str, Any]:
    """The JSON of one architecture; `default` holds the choices of the largest weight."""

    def choices(by_rows: dict[int, Timed]) -> list[dict[str, Any]]:
        return [
            {"max_rows": rows, **asdict(best.config), "microseconds": round(1e6 * best.seconds, 2)}
            for rows, best in sorted(by_rows.items())
        ]

    if not timed:
        raise RuntimeError("no configuration ran; the reasons are above")
    largest = max(timed, key=lambda shape: math.prod(map(int, shape.split("x"))))
    return {
        "crossover": most_rows,
        "chunk_bytes": chunk_bytes,
        "default": choices(timed[largest]),
        "shapes": {shape: choices(by_rows) for shape, by_rows in timed.items()},
    }


def document(architecture: int, entry: dict[str, Any], measured: dict[str, Any]) -> str:
    content = {"format": configs.FORMAT, "measured": measured, "architectures": {str(architecture): entry}}
    return json.dumps(content, indent=1) + "\n"


def run(
    shapes: Sequence[str],
    rows: Sequence[int],
    group: int,
    dtype: torch.dtype,
    minutes: float,
    *,
    asymmetric: bool = False,
) -> str:
    """Measure on the current CUDA device; the text of a file that LLMQ_W4A16_CONFIGS may name."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    deadline = time.monotonic() + 60 * minutes
    timed: dict[str, dict[int, Timed]] = {}
    fused, dequantized = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    for done, shape in enumerate(shapes):
        N, K = map(int, shape.split("x"))
        case = Case(N, K, group, dtype, device, asymmetric=asymmetric)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(shapes) - done)
        for index, M in enumerate(rows):
            share = time.monotonic() + (until - time.monotonic()) / (len(rows) - index)
            start = case.machine.table.config(M, N, K)
            best = search(start, M, functools.partial(case.fused, M), share)
            dequantized[M] += case.dequantized(M)
            fused[M] += math.inf if best is None else best.seconds
            if best is not None:
                timed.setdefault(shape, {})[M] = best
                print(f"{shape} {M:5} rows: {1e6 * best.seconds:8.1f} us  {best.config}", file=sys.stderr)
    measured = {
        "hardware": properties.name,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton_version()},
        "group": group,
        "asymmetric": asymmetric,
        "dtype": str(dtype).removeprefix("torch."),
    }
    most_rows = crossover(sorted(fused.items()), sorted(dequantized.items()))
    chunk_bytes = gpu.machine_of(device).table.chunk_bytes
    return document(properties.major * 10 + properties.minor, table(timed, most_rows, chunk_bytes), measured)


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmq_kernels.w4a16.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out_features x in_features, as 4096x14336")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="numbers of rows of x")
    parser.add_argument("--group", type=int, default=128, help="columns per group")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--asymmetric", action="store_true", help="weights with zero points")
    parser.add_argument("--minutes", type=float, default=30, help="stop searching after this many minutes")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found; tile sizes are measured on the GPU that will run them")
    text = run(
        chosen.shapes, sorted(chosen.rows), chosen.group, getattr(torch, chosen.dtype), chosen.minutes,
        asymmetric=chosen.asymmetric,
    )  # fmt: skip
    chosen.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
