"""How long a call takes on a device: many calls in one CUDA graph, contenders in turn, the median of the replays.

* Calls cycle through copies of the weight that together are several times the L2 cache, so that each call reads its
  weight from memory, as a layer of a model does.
* One graph holds tens of calls, so launches and the resolution of the clock do not matter.
* Contenders replay in turn within one loop, so that clocks and temperatures are the same for all of them.

On a CPU, where the suite is only tested, it uses the host's clock and one call at a time.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from bench.session import first_line

WARM_UPS = 3


@dataclass(frozen=True)
class Contender:
    """`call(i)` runs on copy i of the weight, i < copies."""

    call: Callable[[int], object]
    copies: int


@dataclass(frozen=True)
class Spread:
    """Seconds of one call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(*(ordered[round(share * last)] for share in (0.5, 0.1, 0.9)))

    def microseconds(self) -> dict[str, float]:
        return {name: round(1e6 * value, 3) for name, value in asdict(self).items()}


Stamps = Callable[[], float]  # seconds of one call; call it when the device is done


def interleaved(
    contenders: Mapping[str, Contender], *, calls: int, replays: int, device: torch.device
) -> tuple[dict[str, Spread], dict[str, str]]:
    """(name -> its times, name -> why it has none); the contenders take turns, `replays` times.

    The host queues everything before it waits: if the device were idle in between, the launch would be timed too.
    """
    runs: dict[str, Callable[[], Stamps]] = {}
    failed: dict[str, str] = {}
    make = _graph_run if device.type == "cuda" else _plain_run
    for name, contender in contenders.items():
        try:
            runs[name] = make(contender, calls)
        except Exception as error:  # a kernel without this shape; the session checks the device
            failed[name] = first_line(error)
    for run in runs.values():
        run()  # not timed: keeps the device busy while the host queues
    stamps = [(name, run()) for _ in range(replays) for name, run in runs.items()]
    now(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, stamp in stamps:
        seconds[name].append(stamp())
    return {name: Spread.of(values) for name, values in seconds.items()}, failed


def events(work: Callable[[], object], *, repeats: int, device: torch.device) -> Spread:
    """Seconds of `work`, launches included, after one run that is not timed."""
    return Spread.of(seconds_of(work, repeats=repeats, device=device))


def seconds_of(work: Callable[[], object], *, repeats: int, device: torch.device) -> list[float]:
    """The seconds of each run of `work`, after one run that is not timed."""
    work()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return seconds


def now(device: torch.device) -> float:
    """The host's clock, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _graph_run(contender: Contender, calls: int) -> Callable[[], Stamps]:
    total = -(-calls // contender.copies) * contender.copies  # whole rounds
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(WARM_UPS):  # compiling, autotuning and workspaces come before the capture
            contender.call(i % contender.copies)
        torch.cuda.synchronize()
        graph.capture_begin()  # not `torch.cuda.graph`, which empties the cache of the allocator
        try:
            for i in range(total):
                contender.call(i % contender.copies)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)

    def run() -> Stamps:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        return lambda: float(first.elapsed_time(last)) / 1e3 / total

    return run


def _plain_run(contender: Contender, calls: int) -> Callable[[], Stamps]:
    contender.call(0)

    def run() -> Stamps:
        start = time.perf_counter()
        for i in range(calls):
            contender.call(i % contender.copies)
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds

    return run
