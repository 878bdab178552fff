"""`Ranks`: the processes of one run, and everything that they exchange.

Each process, a *rank*, has its own share of the calibration sequences. What is summed over tokens is summed over ranks
as well, and the rows of a weight, or the experts of a layer, are quantized by different ranks. After that all ranks
have the same weights. The first rank decides, writes and prints.

`Ranks` itself is the run of one process, which exchanges nothing. `process_group.ProcessGroup` has the same methods for
several processes. All ranks must call the methods that exchange something in the same order.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

WHOLE_BATCHES = 4  # per rank; with fewer, a share is not rounded to whole batches, so that shares stay nearly equal


class MemoryElsewhere(MemoryError):  # noqa: N818  (not an error of this rank)
    """Another rank is out of memory."""


class Ranks:
    """The run of one process.

    rank  the number of this process, from 0
    size  the number of processes
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def part(self, count: int, batch: int = 1) -> range:
        """The share of this rank in `count` things: consecutive ones, almost as many as for every other rank.

        The share consists of whole batches where there are enough of them. The first rank never has fewer than others,
        except by the rounding to batches.
        """
        unit = batch if count >= WHOLE_BATCHES * batch * self.size else 1
        units = -(-count // unit)
        start, stop = (min(count, -(-units * rank // self.size) * unit) for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def device(self, name: str) -> str:
        """The device of this rank, for the value of --device."""
        return name

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over ranks, in place, and return it; all ranks get the same bits."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over ranks; float32 if there are several. All ranks get the same bits."""
        return tensor

    def total(self, *values: float) -> list[float]:
        """The sum of each number over ranks, in float64 and in the order of the ranks."""
        return list(values)

    def least(self, value: int) -> int:
        """The smallest value of all ranks."""
        return value

    def copy_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first rank, in place."""

    def first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank only; all ranks get the result. They wait as long as the first one works.

        Tensors in the result are on the device of each rank, or on the CPU if they were on the CPU.
        """
        return make()

    def all(self, value: T) -> list[T]:
        """The values of all ranks, in order; tensors as in `first`."""
        return [value]

    def reports(self, message: str) -> bool:
        """Before an error ends this rank: whether it is the first one with this message, so that it is printed once."""
        return True

    def try_again(self, error: BaseException) -> bool:
        """Let all ranks leave what they are doing, because this one is out of memory; they raise `MemoryElsewhere`.

        `error` is that of this rank, or `MemoryElsewhere`. Returns False if ranks have left, so that they cannot.
        """
        return True

    def leave(self) -> None:
        """End the exchange: from now on no method may be called that exchanges something."""


ALONE = Ranks()

Total = Callable[..., Sequence[float]]
"""`Ranks.total`, for code that sums over rows of which each rank has a part."""
