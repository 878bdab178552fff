"""Read tensors ahead in a thread.

The thread only reads files. All computation stays in one thread, so that no second pool of workers starts. Nothing that
was read is kept for a later pass: the system caches files, and a cache here would only grow with the model.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from llmq import memory

COMING_SHARE = 4  # the next block is read ahead if it fits into 1/4 of the free memory


class ReadAhead:
    """A function that returns a tensor by name, from the thread or from disk.

    read    reads a tensor by name
    nbytes  the size of a tensor by name
    pin     use pinned memory, from which a GPU copies asynchronously
    reads   how often each tensor was read from disk, by name
    """

    def __init__(self, read: Callable[[str], Tensor], nbytes: Callable[[str], int], *, pin: bool = False) -> None:
        self._read = read
        self._nbytes = nbytes
        self._pin = pin
        self._coming: dict[str, Future[Tensor]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self.reads: dict[str, int] = {}

    def __call__(self, name: str) -> Tensor:
        """Return a tensor on the CPU; the caller owns it. Raises CheckpointError."""
        coming = self._coming.pop(name, None)
        return self._from_disk(name) if coming is None else coming.result()

    def expect(self, names: Iterable[str]) -> None:
        """Start to read tensors that are needed next, if there is memory for them."""
        free, wanted = memory.spare(memory.HOST), list(names)
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
