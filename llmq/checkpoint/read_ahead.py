"""Read tensors before they are asked for, in a thread, and keep those that are needed again while memory lasts.

Only the file is read in the thread: what is computed stays in one thread, so that no second pool of workers starts.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from llmq import memory

KEPT_SHARE = 8  # of the free memory, the part that tensors may take which are read again in a later pass
COMING_SHARE = 4  # the part that the next block may take, while it is read ahead
UNKNOWN = -1  # memory is looked at when the first tensor is read, as a job may be made long before it runs


class ReadAhead:
    """A function that reads a tensor by its name, and may have read it already.

    read    what does it
    nbytes  the size of a tensor, by its name
    pin     keep tensors in memory that a GPU copies from without waiting
    reads   how often each tensor was read from the disk, by name
    """

    def __init__(self, read: Callable[[str], Tensor], nbytes: Callable[[str], int], *, pin: bool = False) -> None:
        self._read = read
        self._nbytes = nbytes
        self._pin = pin
        self._room = UNKNOWN  # bytes that kept tensors may take
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the last one used comes last
        self._kept_bytes = 0
        self._coming: dict[str, Future[Tensor]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self.reads: dict[str, int] = {}

    def __call__(self, name: str) -> Tensor:
        """A tensor of the caller's own, on the CPU.  Raises CheckpointError."""
        coming = self._coming.pop(name, None)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name].clone()
        tensor = self._from_disk(name) if coming is None else coming.result()
        return self._keep(name, tensor)

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read tensors that will be asked for next, where there is memory for them."""
        free = self._look()
        wanted = [name for name in names if name not in self._kept]
        if free < memory.AMPLE_BYTES or sum(map(self._nbytes, wanted)) > free // COMING_SHARE:
            return
        for future in self._coming.values():  # what was expected and never asked for
            future.cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmq-read")
        self._coming = {name: self._thread.submit(self._from_disk, name) for name in wanted}

    def _from_disk(self, name: str) -> Tensor:
        with self._lock:
            self.reads[name] = self.reads.get(name, 0) + 1
        tensor = self._read(name)
        return tensor.pin_memory() if self._pin else tensor

    def _look(self) -> int:
        """Bytes of memory that are free now; what may be kept follows from it."""
        free = memory.spare(memory.HOST)
        self._room = (free + self._kept_bytes) // KEPT_SHARE if free >= memory.AMPLE_BYTES else 0
        self._give_back()
        return free

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        if self._room == UNKNOWN:
            self._look()
        if tensor.nbytes > self._room:
            return tensor
        self._kept[name] = tensor
        self._kept_bytes += tensor.nbytes
        self._give_back()
        return tensor.clone()

    def _give_back(self) -> None:
        """Give back those that were not used for longest, until what is kept fits."""
        while self._kept_bytes > self._room:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
