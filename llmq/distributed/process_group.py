"""Several processes, started by torchrun, `accelerate launch` or by hand: `Ranks` over torch.distributed.

    torchrun --nproc-per-node 4 -m llmq quantize MODEL OUT

They are recognized by the environment variables of torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
Tensors on a GPU are exchanged by nccl, all others by gloo.

**Same bits on all ranks.** gloo's all_reduce is a ring: every element is added up once, in an order that depends only
on its position and on the number of ranks, and the sum is copied to all ranks. So all ranks get the same bits, and the
same command gets the same bits again (a test checks both). Another number of ranks adds in another order. nccl copies
its sums as well; it may choose another order on another machine.

**Out of memory.** Before each exchange the ranks agree that all of them have come so far. A rank that is out of memory
takes part in the next agreement only, in which the others learn it. Then all of them continue more economically.

**Failures.** A process that ends closes its connections, so the others fail in their next exchange, and raise
`Interrupted`. torchrun also sends them SIGTERM, which the command line handles like Ctrl-C. Only a machine that stops
answering is noticed late, after `ANSWER_WITHIN`. A rank that waits for nccl does not react to SIGTERM; torchrun kills
it after 30 seconds. The staging folder is valid at every moment, so none of this damages it.
"""

import hashlib
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llmq.distributed.message import Message
from llmq.distributed.ranks import MemoryElsewhere, Ranks, T
from llmq.errors import BackendError, ConfigError, Interrupted

ANSWER_WITHIN = timedelta(minutes=30)
OTHERS_REPORT_WITHIN = 5.0  # seconds that the first process waits for errors of the others before it ends
LONGEST_PAUSE = 0.25  # seconds between two looks at what the first rank has done


class ProcessGroup(Ranks):
    """The ranks of a process group of torch.distributed. Created by `start`."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._device = device
        self._asked = 0  # calls of `first`
        self._left = False

    def device(self, name: str) -> str:
        return str(self._device)

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._exchange():
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor.to(torch.float32, copy=True)).div_(self.size)

    def total(self, *values: float) -> list[float]:
        own = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(parts, own)
        return [float(value) for value in torch.stack(parts).sum(0)]

    def least(self, value: int) -> int:
        own = torch.tensor(value, dtype=torch.int64)
        with self._exchange():
            dist.all_reduce(own, dist.ReduceOp.MIN)
        return int(own)

    def copy_(self, tensor: Tensor) -> None:
        with self._exchange():
            dist.broadcast(tensor, 0)

    def first(self, make: Callable[[], T]) -> T:
        name = f"first-{self._asked}"
        self._asked += 1
        if self.is_first:
            try:
                message = Message.of(value := make())
            finally:  # if memory has run out, the others learn it in the exchange
                with answered():
                    self._store.set(name, "ready")
            with self._exchange():
                self._send(message)
            return value
        self._wait(name)
        with self._exchange():
            result: T = self._receive(0)
        return result

    def all(self, value: T) -> list[T]:
        own = Message.of(value)
        with self._exchange():
            return [self._send(own, value) if self.rank == r else self._receive(r) for r in range(self.size)]

    def reports(self, message: str) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending, and must not be stopped while it prints
        name = f"report-{hashlib.sha256(message.encode()).hexdigest()}"
        try:
            is_first_to_report = bool(self._store.add(name, 1) == 1)
            end = time.monotonic() + OTHERS_REPORT_WITHIN
            while self.is_first and self._store.add(name, 0) < self.size and time.monotonic() < end:
                time.sleep(0.05)  # this process keeps the store, which the others ask
        except RuntimeError:  # the process that kept the store has ended
            return True
        return is_first_to_report

    def try_again(self, error: BaseException) -> bool:
        if not self._left and not isinstance(error, MemoryElsewhere):
            with answered():
                if self.is_first:  # others may wait for what it makes next
                    self._store.set(f"first-{self._asked}", "ready")
                    self._asked += 1
                self._agree(out_of_memory=True)
        return not self._left

    def leave(self) -> None:
        self.total(0.0)  # the others have received everything; nccl must be left by all at once
        self._left = True
        dist.destroy_process_group()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """An exchange, before which every rank learns whether all of them have come so far."""
        with answered():
            if self._agree(out_of_memory=False):
                raise MemoryElsewhere("another process is out of memory")
            yield

    def _agree(self, *, out_of_memory: bool) -> bool:
        """Whether a rank is out of memory. Then all have counted the same number of calls of `first` afterwards."""
        state = torch.tensor([int(out_of_memory), self._asked], dtype=torch.int64)
        dist.all_reduce(state, dist.ReduceOp.MAX)
        if state[0]:
            self._asked = int(state[1])
        return bool(state[0])

    def _wait(self, name: str) -> None:
        """Wait until the first rank has set `name`: as long as it works, if that takes hours."""
        pause = 0.001
        with answered():
            while not self._store.check([name]):
                time.sleep(pause)  # signals are handled here, not inside the waiting of the store
                pause = min(2 * pause, LONGEST_PAUSE)

    def _send(self, message: "Message", value: T | None = None) -> Any:
        """Send a message to all other ranks; returns `value`."""
        with answered():
            dist.broadcast(torch.tensor([len(message.text), *message.nbytes]), self.rank)
            dist.broadcast(torch.frombuffer(bytearray(message.text), dtype=torch.uint8), self.rank)
            for data in message.data:
                if len(data):
                    dist.broadcast(data, self.rank)
        return value

    def _receive(self, rank: int) -> Any:
        sizes = torch.empty(3, dtype=torch.int64)
        with answered():
            dist.broadcast(sizes, rank)
            text, *nbytes = sizes.tolist()
            encoded = torch.empty(text, dtype=torch.uint8)
            dist.broadcast(encoded, rank)
            places = (torch.device("cpu"), self._device)
            data = [torch.empty(n, dtype=torch.uint8, device=place) for n, place in zip(nbytes, places, strict=True)]
            for part in data:
                if len(part):
                    dist.broadcast(part, rank)
        return Message(encoded.numpy().tobytes(), (data[0], data[1])).value()


@contextmanager
def answered() -> Iterator[None]:
    """Turn the errors of an exchange into `Interrupted`: another process has ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:  # also of nccl and of the store
        raise _ended(error) from error


def _ended(error: RuntimeError) -> Interrupted:
    reason = re.sub(r"^\[.*?\] *", "", str(error).partition("\n")[0]).partition(". ")[0]  # without the place in gloo
    return Interrupted(
        "another process of this run has ended or does not answer",
        hint=f"see its message ({reason}); the same command continues after the last finished block",
    )


def start(device: str, environment: Mapping[str, str]) -> ProcessGroup:
    """Join the process group of the environment variables RANK, WORLD_SIZE, …; see `llmq.distributed.join`."""
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    chosen = _device(device, int(environment.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    with answered():
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=ANSWER_WITHIN)))
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=ANSWER_WITHIN)
    return ProcessGroup(rank, size, PrefixStore("llmq", store), chosen)


def _device(name: str, local: int) -> torch.device:
    """The device of process number `local` of this machine."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {name} was given to several processes, but each of them needs a separate device",
            hint="leave --device out: each process takes one GPU of its machine",
        )
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if local >= count:
        raise BackendError(
            f"process {local} of this machine has no GPU: torch sees {count} CUDA devices",
            hint="start as many processes as there are GPUs (--nproc-per-node), or add --device cpu",
        )
    return torch.device("cuda", local)
