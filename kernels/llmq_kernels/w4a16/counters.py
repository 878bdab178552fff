"""Counters for split K: zero when a kernel starts, zero again when it ends, and never shared by two that run at once.

Launches in one stream run one after another, so each stream has one set.  A CUDA graph may be replayed in any stream,
beside eager work or beside another graph, so every launch that is captured gets counters of its own for good; a graph
does not run beside itself.  All come from one buffer a device, zeroed once, which is allocated

* never while a graph is captured: the zeroing would be part of that graph and the memory of its pool.  A launch that
  is captured before there is a buffer, or after the last counter is given away, takes a fresh zeroed tensor, as part
  of the graph: as right, and one more node;
* in a thread of its own, because PyTorch's graph trees send the allocations of the thread that warms up to the memory
  of a graph, where nothing may stay behind;
* with one synchronisation, so that every stream sees the zeros.

A launch that fails half-way leaves a counter that is not zero; but after that its CUDA context is lost too.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

TOTAL = 1 << 20  # 4 MB, a hundred captured decodes of a model of 32 layers
PER_STREAM = 1 << 12
LINE = 32  # 128 bytes: counters of two launches share no cache line


class Bank:
    """What one zeroed buffer (TOTAL,) int32 still has to give."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._given = 0
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def of_stream(self, stream: int) -> Tensor | None:
        """(PER_STREAM,) int32, the same at every call for one stream; None where no counters are left."""
        found = self._of_stream.get(stream)
        if found is None:
            found = self.take(PER_STREAM)
            if found is not None:
                self._of_stream[stream] = found
        return found

    def take(self, count: int) -> Tensor | None:
        """(count,) int32 for good; None where so many are not left."""
        with self._lock:
            first, after = self._given, self._given + -(-count // LINE) * LINE
            if after > self._buffer.shape[0]:
                return None
            self._given = after
        return self._buffer[first : first + count]


_banks: dict[torch.device, Bank] = {}


def zeroed(count: int, device: torch.device) -> Tensor:
    """At least `count` counters int32 for a launch in the current stream of `device`, the current device."""
    found = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            found = _banks[device].take(count) if device in _banks else None
        elif count <= PER_STREAM:
            bank = _banks.get(device) or _banks.setdefault(device, Bank(_buffer(device)))  # of two threads, one wins
            found = bank.of_stream(torch.cuda.current_stream(device).cuda_stream)
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found


def _buffer(device: torch.device) -> Tensor:
    def allocate() -> Tensor:
        with torch.cuda.device(device):
            buffer = torch.zeros(TOTAL, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
        return buffer

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(allocate).result()
