"""Call a reader with a damaged input: it may return or raise an error of llmq, within limits of time and memory."""

import resource
import signal
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llmq.errors import LlmqError

SECONDS = 2.0  # of CPU time per input
COPIES = 4  # of the input in memory
OVERHEAD = 4 << 20  # bytes that a reader may use for any input
ADDRESS_SPACE = 1 << 30  # bytes that this process may reserve in addition


class TooLong(BaseException):
    """Not an Exception, so that no reader catches it."""


@dataclass
class Outcomes:
    """What happened to the inputs: how many were read, how many refused, and the failures by their cause."""

    read: int = 0
    refused: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)

    def attempt(self, number: int, call: Callable[[], object], nbytes: int, *, traced: bool = True) -> None:
        """Call a reader with input `number` of `nbytes` bytes; its memory is measured if it is `traced`."""
        if traced:
            tracemalloc.start()
        try:
            call()
            self.read += 1
        except LlmqError:
            self.refused += 1
        except (Exception, TooLong) as error:
            self.failures.setdefault(_cause(error), []).append(number)
        _, peak = tracemalloc.get_traced_memory()  # 0 if it was not traced
        tracemalloc.stop()
        if peak > COPIES * nbytes + OVERHEAD:
            self.failures.setdefault(f"allocates more than {COPIES} times the input", []).append(number)

    def __str__(self) -> str:
        listed = [f"{len(numbers)} inputs, such as {numbers[:3]}: {cause}" for cause, numbers in self.failures.items()]
        return "\n".join((f"{self.read} read, {self.refused} refused", *listed))


@contextmanager
def limits() -> Iterator[None]:
    """While open, an attempt is interrupted after `SECONDS` of CPU time, and memory is limited."""
    memory, space = resource.getrlimit(resource.RLIMIT_AS)
    in_use = psutil.Process().memory_info().vms
    handler = signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_SPACE, space))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (memory, space))


def start_clock() -> None:
    """Start to count the CPU time of an attempt."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _stop(*_: object) -> None:
    raise TooLong(f"takes more than {SECONDS:g} s")


def _cause(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/llmq/" in frame.filename and "/site-packages/" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} {frame.name}: {str(error)[:80]}"
