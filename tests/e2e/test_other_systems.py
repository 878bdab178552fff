"""The command line without what Windows and macOS lack: `resource`, `fcntl`, `/proc`, `/sys` and limits of psutil.

It runs on Linux in one process, where these are taken away before anything of llmq is imported.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmq.report.peak import peak_memory
from tests import builders
from tests.command_line import ROOT, environment

NEITHER = """
import pathlib
def hidden(self, *args, plain, **named):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return plain(self, *args, **named)
for name in ("open", "read_text", "read_bytes", "stat"):
    plain = getattr(pathlib.Path, name)
    setattr(pathlib.Path, name, lambda self, *args, plain=plain, **named: hidden(self, *args, plain=plain, **named))
del psutil.RLIMIT_AS, psutil.Process.rlimit
"""
WINDOWS = f"""
import psutil, sys, types  # psutil itself is another one there
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
{NEITHER}
plain_info = psutil.Process.memory_info
psutil.Process.memory_info = lambda self: types.SimpleNamespace(**plain_info(self)._asdict(), peak_wset=12345)
"""
COMMANDS = """
from llmq.cli import main
def run(*arguments):
    sys.argv = ["llmq", *arguments]
    try:
        main()
    except SystemExit as leaving:
        assert not leaving.code, arguments
model, text, out = sys.argv[1:]
few = ("--calibration", text, "--samples", "4", "--seqlen", "32", "--device", "cpu")
run("--help")
run("env")
run("quantize", model, out, "--method", "gptq", "--format", "gptq,compressed-tensors", "--group-size", "16", *few)
run("sensitivity", model, "--grid", "4:16", *few)
run("inspect", f"{out}/gptq")
run("verify", f"{out}/gptq")
run("convert", f"{out}/gptq", f"{out}/other", "--to", "compressed-tensors")
run("eval", f"{out}/other", "--against", model, "--text", text, "--windows", "2", "--seqlen", "16", "--device", "cpu")
run("generate", f"{out}/other", "--prompt", "ab", "--max-tokens", "2", "--device", "cpu")
"""


def test_every_command_runs_on_windows(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    text = builders.write_text(tmp_path / "text.txt")
    program = f"import sys\n{WINDOWS}\n{COMMANDS}"
    arguments = [str(checkpoint("llama", num_hidden_layers=1)), str(text), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loads it" in done.stdout and "KL" in done.stdout


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where psutil has no peak, and `resource` has."""
    with_proc = peak_memory()
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert peak_memory() >= with_proc // 2 > 0
