"""What a machine can do: rates per kind of work, and its memory.

The rates are measured by running the code of llmq on small inputs, so they include the inefficiency of this code. They
take about two seconds on one core. A trial of one block corrects them for a real run: `Machine.corrected`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from llmq import memory
from llmq.algorithms.factor import factorize
from llmq.cost.work import OPERATIONS_PER_CANDIDATE, OPERATIONS_PER_COLUMN, Kind, Work
from llmq.numerics import affine_grid
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.gptq_block import op as gptq_block
from llmq_kernels.gptq_block.problem import Problem

REPEATS = 3
SHORTEST_TIMING = 0.02  # seconds
SIZE = 768  # of the measured products
BLOCK = 128  # columns of the measured loop
ROWS = 512
MOVED_ELEMENTS = 1 << 20
SMALL_OPERATIONS = 2000
# Not measured, because it takes too long: files in bytes per second, and links between devices.
FILES_READ, FILES_WRITTEN, LINK = 2e9, 1e9, 2e10
# One core of a server of 2023, and its files.
TYPICAL = {
    Kind.FLOAT32: 9e10, Kind.HALF: 1.5e11, Kind.FLOAT64: 1.5e10, Kind.SEARCHED: 1.2e9, Kind.COLUMNS: 9e7,
    Kind.MOVED: 2e10, Kind.CALLS: 3e5, Kind.READ: FILES_READ, Kind.WRITTEN: FILES_WRITTEN, Kind.SENT: LINK,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """One device and its host.

    device       "cpu" or "cuda"
    rates        units of each kind per second
    free_device  free bytes of the device's memory; of a CPU the same as `free_host`
    free_host    free bytes of main memory
    process      bytes that a process takes before a model is opened
    correction   measured time / predicted time of a trial
    """

    device: str
    rates: Mapping[Kind, float]
    free_device: int
    free_host: int
    process: int
    correction: float = 1.0

    def seconds(self, work: Work) -> float:
        """The time for an amount of work, one kind after the other."""
        return self.correction * sum(amount / self.rates[kind] for kind, amount in work.amounts.items())

    def corrected(self, predicted: float, measured: float) -> "Machine":
        """The machine after a trial that was predicted to take and has taken these seconds."""
        return replace(self, correction=self.correction * measured / predicted)


def typical() -> Machine:
    """A CPU with typical rates, for jobs that are too short to measure the machine for."""
    free = memory.spare(memory.HOST)
    rates = {kind: rate * (torch.get_num_threads() if kind.is_product else 1) for kind, rate in TYPICAL.items()}
    return Machine(memory.HOST.type, rates, free, free, int(psutil.Process().memory_info().rss))


def measure(device: str = "cpu") -> Machine:
    """Measure the rates of this machine; a GPU is used by nobody else meanwhile."""
    place = torch.device(device)
    free_host = memory.spare(memory.HOST)
    process = int(psutil.Process().memory_info().rss)
    calls = _calls(place)
    rates = {
        Kind.FLOAT32: _products(place, torch.float32),
        Kind.HALF: _products(place, torch.bfloat16),
        Kind.FLOAT64: _factorization(place),
        Kind.SEARCHED: _search(place, calls),
        Kind.COLUMNS: _columns(place, calls),
        Kind.MOVED: _moved(place),
        Kind.CALLS: calls,
        Kind.READ: FILES_READ,
        Kind.WRITTEN: FILES_WRITTEN,
        Kind.SENT: LINK,
    }
    free_device = memory.spare(place) if place.type != memory.HOST.type else free_host
    return Machine(place.type, rates, free_device, free_host, process)


def _rate(amount: float, run: Callable[[], object], device: torch.device, overhead: float = 0.0) -> float:
    """Amount per second of the median of some timings, without `overhead` seconds per run; the first timing warms up.

    A CPU is measured in CPU seconds of this thread times the number of threads, so that other processes do not count.
    Some machines count CPU seconds in steps of 10 ms, so a timing takes runs until the clock has moved far enough.
    """
    times = []
    clock = time.thread_time if device.type == memory.HOST.type else time.perf_counter
    for _ in range(REPEATS + 1):
        _wait(device)
        start, runs, seconds = clock(), 0, 0.0
        while seconds < SHORTEST_TIMING:
            run()
            _wait(device)
            runs, seconds = runs + 1, clock() - start
        times.append(seconds / runs)
    median = sorted(times[1:])[REPEATS // 2]
    return amount / max(median - overhead, median / 10)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    return _rate(2.0 * SIZE**3, lambda: left @ right, device)


def _factorization(device: torch.device) -> float:
    """FLOP as `solver.factor` counts them."""
    inputs = torch.randn(2 * SIZE, SIZE, device=device)
    hessian = inputs.T @ inputs
    return _rate(SIZE**3 * 4 / 3, lambda: factorize(hessian, "activation", 0.01), device)


def _search(device: torch.device, calls: float) -> float:
    weight, scheme = torch.randn(ROWS, 4 * BLOCK, device=device), WeightScheme(4, BLOCK)
    candidates = 1 + affine_grid.COARSE_STEPS + affine_grid.FINE_STEPS
    overhead = candidates * OPERATIONS_PER_CANDIDATE / calls
    amount = float(weight.numel() * candidates)
    return _rate(amount, lambda: affine_grid.fit_searched(weight, scheme, torch.float16), device, overhead)


def _columns(device: torch.device, calls: float) -> float:
    columns = torch.randn(1, BLOCK, 8 * ROWS, device=device)
    upper = torch.eye(BLOCK, device=device)[None]
    scales, zeros = (torch.full((1, 1, 8 * ROWS), value, device=device) for value in (0.5, 8.0))
    group_of = torch.zeros(1, BLOCK, dtype=torch.int32, device=device)

    def run() -> None:
        gptq_block.compensate(Problem(columns.clone(), upper, scales, zeros, group_of, 15))

    return _rate(float(columns.numel()), run, device, BLOCK * OPERATIONS_PER_COLUMN / calls)


def _moved(device: torch.device) -> float:
    values, sums = torch.zeros(MOVED_ELEMENTS, device=device), torch.zeros(MOVED_ELEMENTS, device=device)
    return _rate(2.0 * values.nbytes, lambda: torch.mul(values, 2, out=sums), device)


def _calls(device: torch.device) -> float:
    value = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(SMALL_OPERATIONS):
            value.add(1)

    return _rate(float(SMALL_OPERATIONS), run, device)
