"""Where the time of a run goes: named functions of the program are watched, each is charged what it spends itself.

A function that calls another watched one stops its own clock meanwhile, so that the charges add up to the whole.  The
clock waits for the device at every change, which costs a little overlap: the whole is timed once more without.

Calibration may run the forwards of several batches as greenlets, which stop inside a watched function and let others
go on.  Each greenlet has a stack of its own here, and a switch changes the clock that runs.
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
        self._stacks: dict[Any, list[str]] = {}
        self._current: Any = None
        self._since = now()

    def charge(self) -> None:
        """Give the time since the last change to what ran."""
        moment = self._now()
        stack = self._stacks.get(self._current)
        label = stack[-1] if stack else REST
        self.seconds[label] = self.seconds.get(label, 0.0) + moment - self._since
        self._since = moment

    def enter(self, label: str) -> None:
        self.charge()
        self._stacks.setdefault(self._current, []).append(label)

    def leave(self) -> None:
        self.charge()
        self._stacks[self._current].pop()

    def switched(self, event: str, ends: tuple[Any, Any]) -> None:
        """What `greenlet.settrace` calls."""
        self.charge()
        self._current = ends[1]

    def taken(self) -> dict[str, float]:
        """The seconds so far; starts again at nothing."""
        self.charge()
        seconds, self.seconds = self.seconds, {}
        return seconds


@contextmanager
def watching(stopwatch: Stopwatch, points: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """While open, `stopwatch` is told of every call of `points`, (label, "module:name" or "module:Class.name").

    Gives the points that are not there: the program may have changed since the list was written.
    """
    undo: list[tuple[Any, str, Any]] = []
    missing = []
    greenlet = _greenlet()
    try:
        for label, point in points:
            found = _find(point)
            if found is None:
                missing.append(point)
                continue
            owner, name = found
            undo.append((owner, name, vars(owner)[name]))
            setattr(owner, name, _watched(stopwatch, label, vars(owner)[name]))
        if greenlet is not None:
            stopwatch._current = greenlet.getcurrent()
            greenlet.settrace(stopwatch.switched)
        yield missing
    finally:
        if greenlet is not None:
            greenlet.settrace(None)
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def _find(point: str) -> tuple[Any, str] | None:
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


def _greenlet() -> Any:
    """The module, or None where it is not installed and nothing can have used it."""
    try:
        return importlib.import_module("greenlet")
    except ImportError:
        return None
