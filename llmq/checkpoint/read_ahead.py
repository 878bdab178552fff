"""Read tensors ahead in a thread, and cache tensors that are needed again while there is memory for them.

The thread only reads files. All computation stays in one thread, so that no second pool of workers starts.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from llmq import memory

KEPT_SHARE = 8  # 1/8 of the free memory is the cache for tensors that a later pass reads again
COMING_SHARE = 4  # the next block is read ahead if it fits into 1/4 of the free memory
UNKNOWN = -1  # memory is measured at the first read, because a job may be created long before it runs


class ReadAhead:
    """A function that returns a tensor by name, from the cache, from the thread or from disk.

    read    reads a tensor by name
    nbytes  the size of a tensor by name
    pin     use pinned memory, from which a GPU copies asynchronously
    reads   how often each tensor was read from disk, by name
    """

    def __init__(self, read: Callable[[str], Tensor], nbytes: Callable[[str], int], *, pin: bool = False) -> None:
        self._read = read
        self._nbytes = nbytes
        self._pin = pin
        self._room = UNKNOWN  # bytes for cached tensors
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the most recently used tensor is last
        self._kept_bytes = 0
        self._coming: dict[str, Future[Tensor]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self.reads: dict[str, int] = {}

    def __call__(self, name: str) -> Tensor:
        """Return a tensor on the CPU; the caller owns it. Raises CheckpointError."""
        coming = self._coming.pop(name, None)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name].clone()
        tensor = self._from_disk(name) if coming is None else coming.result()
        return self._keep(name, tensor)

    def expect(self, names: Iterable[str]) -> None:
        """Start to read tensors that are needed next, if there is memory for them."""
        free = self._measure_memory()
        wanted = [name for name in names if name not in self._kept]
        if free < memory.AMPLE_BYTES or sum(map(self._nbytes, wanted)) > free // COMING_SHARE:
            return
        for future in self._coming.values():  # expected earlier, but never requested
            future.cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmq-read")
        self._coming = {name: self._thread.submit(self._from_disk, name) for name in wanted}

    def _from_disk(self, name: str) -> Tensor:
        with self._lock:
            self.reads[name] = self.reads.get(name, 0) + 1
        tensor = self._read(name)
        return tensor.pin_memory() if self._pin else tensor

    def _measure_memory(self) -> int:
        """Measure the free memory in bytes, and set the size of the cache."""
        free = memory.spare(memory.HOST)
        self._room = (free + self._kept_bytes) // KEPT_SHARE if free >= memory.AMPLE_BYTES else 0
        self._give_back()
        return free

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        if self._room == UNKNOWN:
            self._measure_memory()
        if tensor.nbytes > self._room:
            return tensor
        self._kept[name] = tensor
        self._kept_bytes += tensor.nbytes
        self._give_back()
        return tensor.clone()

    def _give_back(self) -> None:
        """Drop the least recently used tensors until the cache fits."""
        while self._kept_bytes > self._room:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
