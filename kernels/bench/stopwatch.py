"""Where the time of a run goes: the seconds of named functions of the program.

While one of them calls another, only the inner one is charged, so the charges add up to the whole.  The clock
synchronizes with the device at every change, which costs a little overlap; so the whole is also timed without it.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

REST = "rest"


class Stopwatch:
    """Seconds by label; `now` is a clock that waits for the device."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._stack: list[str] = []
        self._since = now()

    def charge(self) -> None:
        """Add the time since the last change to what ran."""
        moment = self._now()
        label = self._stack[-1] if self._stack else REST
        self.seconds[label] = self.seconds.get(label, 0.0) + moment - self._since
        self._since = moment

    def enter(self, label: str) -> None:
        self.charge()
        self._stack.append(label)

    def leave(self) -> None:
        self.charge()
        self._stack.pop()

    def taken(self) -> dict[str, float]:
        """The seconds so far; starts again at 0."""
        self.charge()
        seconds, self.seconds = self.seconds, {}
        return seconds


@contextmanager
def watching(stopwatch: Stopwatch, points: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """While open, `stopwatch` times every call of `points`, (label, "module:name" or "module:Class.name").

    Yields the points that do not exist: the program may have changed since the list was written.
    """
    undo: list[tuple[Any, str, Any]] = []
    missing = []
    try:
        for label, point in points:
            place = find(point)
            if place is None:
                missing.append(point)
                continue
            owner, name = place
            undo.append((owner, name, vars(owner)[name]))
            setattr(owner, name, _watched(stopwatch, label, vars(owner)[name]))
        yield missing
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def find(point: str) -> tuple[Any, str] | None:
    """(owner, name) of a function, for example (the class Block, "load"); None if it does not exist."""
    module_name, path = point.split(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError:
        return None
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    return (owner, name) if owner is not None and name in vars(owner) else None


def _watched(stopwatch: Stopwatch, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        stopwatch.enter(label)
        try:
            return function(*args, **kwargs)
        finally:
            stopwatch.leave()

    return timed
