"""Measure time and memory of a whole process, including imports."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One finished process with all its children; the memory is that of the largest process.

    cpu_seconds   in user and system mode
    user_seconds  in user mode only
    """

    wall_seconds: float
    cpu_seconds: float
    user_seconds: float
    peak_megabytes: float


class ProcessError(Exception):
    """The program failed; `output` is its output."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"exit code {code}")
        self.output = output


def measured(command: list[str], log: Path, cwd: Path | None = None) -> Measured:
    """Run a command in `cwd` with its output in `log`; raises ProcessError. Works only on Unix."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
        _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if process.returncode:
        raise ProcessError(process.returncode, log.read_text(errors="replace"))
    return Measured(wall, used.ru_utime + used.ru_stime, used.ru_utime, used.ru_maxrss * 1024 / 1e6)


def import_seconds(python: Path, statement: str, scratch: Path, cwd: Path | None = None) -> float:
    """Seconds in user mode of a process that only imports; raises ProcessError."""
    return measured([str(python), "-c", statement], scratch / "imports.log", cwd).user_seconds
