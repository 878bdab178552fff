"""The command line, called like `llmq …`, in this process or in a separate one."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from llmq import cli

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its exit code, stdout and stderr."""

    exit_code: int
    stdout: str
    stderr: str


def llmq(*arguments: str | Path) -> Outcome:
    """Run a command in this process; an exception that the user would see as a traceback fails the test."""
    stdout, stderr = io.StringIO(), io.StringIO()
    exit_code = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with mock.patch.object(sys, "argv", ["llmq", *map(str, arguments)]):
            try:
                cli.main()
            except SystemExit as leaving:
                exit_code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return Outcome(exit_code, stdout.getvalue(), stderr.getvalue())


def command(*arguments: str | Path) -> list[str]:
    """The command line for a separate process; run it with `environment()`."""
    return [sys.executable, "-m", "llmq", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process, with the checkout on PYTHONPATH for processes in other folders."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, **changes}


def llmq_process(*arguments: str | Path, cwd: Path = ROOT, **changes: str) -> Outcome:
    """Run a command in a separate process."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
