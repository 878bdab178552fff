"""The tests that need a GPU, the checks of `checks.py`, and NVIDIA's sanitizer where it is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import checks, warm
from bench.plan import Plan
from bench.results import ROOT
from bench.session import Result, Session

SHARE_OF_TESTS = {True: 0.6, False: 0.95}  # of the section's time, with a sanitizer to run afterwards and without
SANITIZER_SECONDS = 30.0
LEAST_SECONDS = 10.0
# `path::test PASSED [ 5%]`, or from parallel workers `[gw3] [ 5%] PASSED path::test`
KINDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] ({KINDS}) (\S+::\S.*?)|(\S+::\S.*?) ({KINDS})(?: .*)?)\s*$")
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::\S.*?) - (.*)")
ERRORS_FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
TOOLS = ("memcheck", "racecheck", "initcheck")


def measure(plan: Plan, session: Session) -> None:
    """Cases: compile, those of `checks`, tests, and one for each of TOOLS."""
    sanitizer = shutil.which(SANITIZER) is not None
    end_of_tests = time.monotonic() + SHARE_OF_TESTS[sanitizer] * session.seconds_left
    with running_tests() as tests:  # while the checks run, on other cores
        if plan.device == "cuda":
            session.run("compile", partial(warm.compile_ahead, plan, "checks", session, 0.4 * session.seconds_left))
        checks.measure(plan, session)
        session.run("tests", partial(judge_tests, tests, session, end_of_tests))
    for tool in TOOLS:
        seconds = min(SANITIZER_SECONDS, session.seconds_left)
        session.run(tool, partial(sanitize, tool, seconds), needs=LEAST_SECONDS if sanitizer else 0.0)


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


SANITIZER = "compute-sanitizer"


def sanitize(tool: str, seconds: float) -> Result:
    """`sanitized.py` under one tool of the sanitizer."""
    if shutil.which(SANITIZER) is None:
        return {"available": False, "wrong": False, "summary": f"{SANITIZER} is not installed"}
    # Without PyTorch's allocator every tensor is a separate allocation, whose bounds the tool knows.
    from bench import sanitized

    sanitized.main()  # compiles, so that the checked program does not
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [SANITIZER, *options, sys.executable, "-m", "bench.sanitized"]
    try:
        done = subprocess.run(
            command, cwd=Path(ROOT), env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"available": True, "wrong": False, "finished": False, "summary": f"not finished after {seconds:.0f} s"}
    text = done.stdout + done.stderr
    summary = ERRORS_FOUND.findall(text)
    ran = bool(summary) and "done" in done.stdout.split()
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
