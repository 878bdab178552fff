"""A few of the moments of scripts/kill_runs.py; docs/RELIABILITY.md has the counts of a longer run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ROOT, environment


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    record = tmp_path / "kills.json"
    command = [sys.executable, "scripts/kill_runs.py", "--moments", "6", "--cases", "4", "10", "--record", str(record)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(record.read_text())["cases"]
    assert len(cases) == 2
    for case in cases.values():
        assert case["failures"] == [] and case["boundaries"] > 50 and case["at_boundary"] == 2
