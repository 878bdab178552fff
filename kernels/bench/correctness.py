"""The checks of `checks.py`, and NVIDIA's sanitizer meanwhile where it is installed."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench import checks, warm
from bench.plan import Plan
from bench.results import ROOT
from bench.session import Result, Session

SANITIZER = "compute-sanitizer"
SANITIZER_SECONDS = 30.0
ERRORS_FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
TOOLS = ("racecheck", "memcheck")
COMPILE_SHARE = 0.5  # of the section's time, at most


def measure(plan: Plan, session: Session) -> None:
    """Cases: compile, those of `checks`, and one for each of TOOLS."""
    if plan.device == "cuda":
        limit = COMPILE_SHARE * session.seconds_left
        session.run("compile", partial(warm.compile_ahead, plan, "checks", session, limit))
    with sanitizers() as running:
        checks.measure(plan, session)
        for tool in TOOLS:
            session.run(tool, partial(judged, running.get(tool), min(SANITIZER_SECONDS, session.seconds_left)))


@contextmanager
def sanitizers() -> Iterator[Mapping[str, "subprocess.Popen[str]"]]:
    """`sanitized.py` under each of TOOLS, by its name; killed when the block is left."""
    if shutil.which(SANITIZER) is None:
        yield {}
        return
    # Without PyTorch's allocator every tensor is a separate allocation, whose bounds the tool knows.
    from bench import sanitized

    sanitized.main()  # compiles, so that the checked program does not
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        tool: subprocess.Popen(
            [SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9",
             sys.executable, "-m", "bench.sanitized"],
            cwd=Path(ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for tool in TOOLS
    }  # fmt: skip
    try:
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def judged(process: "subprocess.Popen[str] | None", seconds: float) -> Result:
    """What a sanitizer has found, after waiting for `seconds` at most."""
    if process is None:
        return {"available": False, "wrong": False, "summary": f"{SANITIZER} is not installed"}
    start = time.monotonic()
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        waited = time.monotonic() - start
        return {"available": True, "wrong": False, "finished": False, "summary": f"not finished after {waited:.0f} s"}
    summary = ERRORS_FOUND.findall(text)
    ran = bool(summary) and "done" in text.split()
    wrong = ran and any(int(number) for number in summary)
    lines = [line for line in text.splitlines() if line.startswith("=========")][:20]
    verdict = f"{', '.join(summary)} errors" if ran else "did not run here: " + (lines[0] if lines else text[-200:])
    return {
        "available": ran,
        "wrong": wrong,
        "finished": True,
        "lines": lines if wrong or not ran else [],
        "summary": verdict,
    }
