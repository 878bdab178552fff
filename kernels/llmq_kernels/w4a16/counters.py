"""Counters for split K: zero when a kernel starts, zero again when it ends, never shared by kernels that run together.

Launches in one stream run one after another, so each stream has one set.  A CUDA graph may be replayed in any stream,
at the same time as eager work or another graph, so every captured launch gets separate counters, which it keeps; a
graph does not run at the same time as itself.  All come from one buffer per device, zeroed once, which is allocated

* never while a graph is captured: the zeroing would become part of that graph, and the memory part of its pool.  A
  launch that is captured before there is a buffer, or when no counters are left, uses a new zeroed tensor as part of
  the graph, which is as correct and adds one node;
* in a separate thread, because PyTorch's graph trees allocate for the thread that warms up in the memory of a graph,
  where no allocation may outlive the graph;
* with one synchronization, so that every stream sees the zeros.

A launch that fails in the middle leaves a counter that is not zero; but then its CUDA context is lost too.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

TOTAL = 1 << 20  # 4 MB: a hundred captured decoding steps of a model of 32 layers
PER_STREAM = 1 << 12
LINE = 32  # 128 bytes: counters of two launches share no cache line


class Bank:
    """The unused part of one zeroed buffer (TOTAL,) int32."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def of_stream(self, stream: int) -> Tensor | None:
        """(PER_STREAM,) int32, the same at every call for one stream; None where no counters are left."""
        counters = self._of_stream.get(stream)
        if counters is None:
            counters = self.take(PER_STREAM)
            if counters is not None:
                self._of_stream[stream] = counters
        return counters

    def take(self, count: int) -> Tensor | None:
        """(count,) int32 that are not given out again; None if fewer are left."""
        with self._lock:
            first, after = self._used, self._used + -(-count // LINE) * LINE
            if after > self._buffer.shape[0]:
                return None
            self._used = after
        return self._buffer[first : first + count]


_banks: dict[torch.device, Bank] = {}


def zeroed(count: int, device: torch.device) -> Tensor:
    """At least `count` counters int32 for a launch in the current stream of `device`, the current device."""
    counters = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            counters = _banks[device].take(count) if device in _banks else None
        elif count <= PER_STREAM:
            bank = _banks.get(device) or _banks.setdefault(device, Bank(_buffer(device)))  # of two threads, one wins
            counters = bank.of_stream(current_stream(device))
    return torch.zeros(count, dtype=torch.int32, device=device) if counters is None else counters


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream on a CUDA device, without the Stream object, which takes a microsecond."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


def _buffer(device: torch.device) -> Tensor:
    def allocate() -> Tensor:
        with torch.cuda.device(device):
            buffer = torch.zeros(TOTAL, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
        return buffer

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(allocate).result()
