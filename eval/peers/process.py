"""A program from the shell's point of view: time and memory of the whole process, imports and all."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One finished process with all its children; memory is that of the largest of them."""

    wall_seconds: float
    cpu_seconds: float
    peak_megabytes: float


class ProcessError(Exception):
    """The program failed; `output` is what it said."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"exit code {code}")
        self.output = output


def measured(command: list[str], log: Path, cwd: Path | None = None) -> Measured:
    """Run to the end in `cwd`, output into `log`; raises ProcessError.  Only Unix tells what one child has used."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
        _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for: nobody else need
    if process.returncode:
        raise ProcessError(process.returncode, log.read_text(errors="replace"))
    return Measured(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6)
