"""The records of a section: each case is written to disk as soon as it is measured, so a crash loses nothing.

The file is JSON, one record per line.  `begin` is written before a case, so that a case that kills or hangs the process
is known by name; the next process skips every case that has begun.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class ContextLostError(Exception):
    """The device does not respond any more; only a new process can continue."""


class Session:
    """One section in one process: `seconds` to spend, `path` of the records, `started` for the printed times."""

    def __init__(self, section: str, path: Path, seconds: float, started: float) -> None:
        self._section, self._path, self._started = section, path, started
        self._end = time.monotonic() + seconds
        self.records = read_records(path)
        self._begun = {record["case"] for record in self.records if record["kind"] == "begin"}

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def run(self, case: str, measure: Callable[[], Result], *, needs: float = 0.0) -> Result | None:
        """Measure a case that is expected to take `needs` seconds; None if it failed, has begun before or is left out.

        Raises ContextLostError if its failure lost the device.
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
            json.dumps(result)  # a result that is not JSON is an error of this case only
            _finish_device_work()
        except Exception as error:  # kernels, compilers and drivers raise many types; other cases continue
            self.write("error", case, error=first_line(error))
            self.report(f"{case}: FAILED, {first_line(error)}")
            if _device_is_lost():
                raise ContextLostError(case) from error
            return None
        self.write("result", case, seconds=round(time.monotonic() - start, 2), result=result)
        self.report(f"{case}: {result.get('summary', 'done')}")
        return result

    def write(self, kind: str, case: str, **values: Any) -> None:
        """Append one record to the file."""
        record = {"kind": kind, "case": case, **values}
        self.records.append(record)
        append_record(self._path, record)

    def report(self, line: str) -> None:
        """Print one line of progress and touch the file, whose watcher expects activity."""
        self._path.touch()
        print(f"{time.time() - self._started:7.1f} s  {self._section:<12} {line}", flush=True)


def read_records(path: Path) -> list[Result]:
    """The records of a file, without a last one that is incomplete; none if there is no file."""
    if not path.is_file():
        return []
    records = (_record(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if record is not None]


def append_record(path: Path, record: Result) -> None:
    """Add a record on a new line, also after an incomplete one."""
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
