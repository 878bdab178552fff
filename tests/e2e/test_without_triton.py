"""Where Triton is not installed, as on most CPUs, a run gives the same bytes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.command_line import environment
from tests.runs import quantize

WITHOUT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from pathlib import Path
from tests.runs import quantize
quantize(*map(Path, sys.argv[1:]), method="fast")
"""


def test_the_same_bytes_without_triton(checkpoint: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    model = checkpoint("llama")
    quantize(model, tmp_path / "with", text, method="fast")
    command = [sys.executable, "-c", WITHOUT, str(model), str(tmp_path / "without"), str(text)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert first == second
