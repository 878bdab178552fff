"""The tests that need a GPU, by pytest.  Runs only on request: `checks.py` covers the kernels in less time."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.plan import Plan
from bench.results import ROOT
from bench.session import Result, Session

SHARE = 0.95  # of the section's time
# `path::test PASSED [ 5%]`, or from parallel workers `[gw3] [ 5%] PASSED path::test`
KINDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] ({KINDS}) (\S+::\S.*?)|(\S+::\S.*?) ({KINDS})(?: .*)?)\s*$")
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::\S.*?) - (.*)")


def measure(plan: Plan, session: Session) -> None:
    """Case: tests."""
    end = time.monotonic() + SHARE * session.seconds_left
    with running_tests() as tests:
        session.run("tests", partial(judge_tests, tests, session, end))


@dataclass(frozen=True)
class Tests:
    """Running tests: the process of pytest and its output; `missing` is the reason if there is none."""

    process: subprocess.Popen[str] | None
    output: Path
    missing: str = ""


@contextmanager
def running_tests() -> Iterator[Tests]:
    """`pytest -m gpu` on the tests for GPUs; killed when the block is left."""
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "kernels").glob("test_gpu_*.py"))
    files = [file for file in files if not file.endswith("test_gpu_suite.py")]
    missing = "" if files else "no test needs a GPU"
    if importlib.util.find_spec("pytest") is None:
        missing = "pytest is not installed"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        if missing:
            yield Tests(None, output, missing)
            return
        # The settings of the project name an option of a plugin that may be missing, and make warnings errors.
        command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["-W", "ignore::pytest.PytestConfigWarning"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        with output.open("w") as file:
            process = subprocess.Popen([*command, *files], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, text=True)
        try:
            yield Tests(process, output)
        finally:
            process.kill()
            process.wait()


def judge_tests(tests: Tests, session: Session, end: float) -> Result:
    """Wait for the tests; those that ran in time count."""
    if tests.process is None:
        return {"available": False, "wrong": False, "summary": tests.missing}
    reported = 0
    while tests.process.poll() is None and time.monotonic() < end:
        time.sleep(0.5)
        lines = tests.output.read_text(encoding="utf-8").splitlines()
        if len(lines) > reported:
            reported = len(lines)
            session.report(f"tests: {lines[-1][:110]}")
    return judged(tests.output.read_text(encoding="utf-8").splitlines(), tests.process.poll())


def judged(lines: Sequence[str], code: int | None) -> Result:
    """The outcome of each test, read from the output of pytest; `code` is its exit code, None if it did not end."""
    outcomes = {match[2] or match[3]: match[1] or match[4] for line in lines if (match := OUTCOME.match(line))}
    reasons = {match[1]: match[2][:300] for line in lines if (match := REASON.match(line))}
    count = {kind: sum(outcome == kind for outcome in outcomes.values()) for kind in set(outcomes.values())}
    failures = [
        {"test": name, "reason": reasons.get(name, "")} for name, o in outcomes.items() if o in ("FAILED", "ERROR")
    ]
    wrong = bool(failures) or code not in (0, 5, None)  # 5: no test was collected
    summary = ", ".join(f"{number} {kind.lower()}" for kind, number in sorted(count.items())) or "no test ran"
    if code is None:
        summary += "; out of time before the end"
    outcome: Result = {"available": True, "outcomes": count, "failures": failures, "exit_code": code, "wrong": wrong}
    if wrong and not failures:
        outcome["last_lines"] = lines[-15:]
    return {**outcome, "summary": summary}
