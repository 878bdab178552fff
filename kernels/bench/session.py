"""What a section writes down: each case on disk the moment it is there, so that nothing is lost with the process.

The file is JSON, one record a line.  `begin` is written before a case, so that one that kills or hangs the process is
known by name; the process that takes over skips every case that has begun.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class ContextLostError(Exception):
    """The device answers nothing any more; only a new process can go on."""


class Session:
    """One section in one process: `seconds` to spend, `path` to write to, `started` for what is printed."""

    def __init__(self, section: str, path: Path, seconds: float, started: float) -> None:
        self._section, self._path, self._started = section, path, started
        self._end = time.monotonic() + seconds
        self.records = read_records(path)
        self._begun = {record["case"] for record in self.records if record["kind"] == "begin"}

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def run(self, case: str, measure: Callable[[], Result], *, needs: float = 0.0) -> Result | None:
        """Measure a case that is expected to take `needs` seconds; None where it failed, was known or is left out.

        Raises ContextLostError where its failure took the device along.
        """
        if case in self._begun:
            return None
        if self.seconds_left < needs:
            self.write("left out", case, reason="out of time")
            return None
        self.write("begin", case)
        start = time.monotonic()
        try:
            result = measure()
            json.dumps(result)  # what cannot be written down is an error of this case, not of all
            _finish_device_work()
        except Exception as error:  # whatever a kernel, a compiler or a driver raises: the other cases go on
            self.write("error", case, error=first_line(error))
            self.say(f"{case}: FAILED, {first_line(error)}")
            if _device_is_lost():
                raise ContextLostError(case) from error
            return None
        self.write("result", case, seconds=round(time.monotonic() - start, 2), result=result)
        self.say(f"{case}: {result.get('summary', 'done')}")
        return result

    def write(self, kind: str, case: str, **values: Any) -> None:
        """Append one record and push it to the disk."""
        record = {"kind": kind, "case": case, **values}
        self.records.append(record)
        append_record(self._path, record)

    def say(self, line: str) -> None:
        """One line of progress, and a sign of life for who watches the file."""
        self._path.touch()
        print(f"{time.time() - self._started:7.1f} s  {self._section:<12} {line}", flush=True)


def read_records(path: Path) -> list[Result]:
    """The records of a file, without one that a process was ended in the middle of; none where there is no file."""
    if not path.is_file():
        return []
    found = (_record(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in found if record is not None]


def append_record(path: Path, record: Result) -> None:
    """Add a record on a line of its own, also after one that was not finished."""
    unfinished = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if unfinished else "") + json.dumps(record) + "\n")


def _record(line: str) -> Result | None:
    try:
        record: Result = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record


def results_of(records: list[Result]) -> Mapping[str, Result]:
    """case -> its result."""
    return {record["case"]: record["result"] for record in records if record["kind"] == "result"}


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def _finish_device_work() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_is_lost() -> bool:
    try:
        _finish_device_work()
    except RuntimeError:
        return True
    return False
