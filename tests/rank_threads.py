"""Ranks that are threads of one process: for tests of what ranks compute, not of how they exchange it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq.distributed.ranks import Ranks

T = TypeVar("T")


class ThreadRanks(Ranks):
    """One of `size` ranks; they exchange values through the list `shared`."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._shared, self._barrier = shared, barrier

    def all(self, value: T) -> list[T]:
        self._shared[self.rank] = value
        self._barrier.wait()
        values = list(self._shared)
        self._barrier.wait()
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.all(tensor.clone())).sum(0))

    def mean(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.all(tensor)).float().mean(0)

    def total(self, *values: float) -> list[float]:
        return [sum(own) for own in zip(*self.all(values), strict=True)]

    def least(self, value: int) -> int:
        return min(self.all(value))

    def copy_(self, tensor: Tensor) -> None:
        tensor.copy_(self.all(tensor.clone())[0])

    def first(self, make: Callable[[], T]) -> T:
        return self.all(make() if self.is_first else None)[0]  # type: ignore[return-value]


def run(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """The result of `work` for each rank."""
    shared, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def of_rank(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, size, shared, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(of_rank, range(size)))
