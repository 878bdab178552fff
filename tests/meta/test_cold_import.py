"""`import llmq` and `llmq --help` are fast: they import neither torch nor any other heavy package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "pydantic", "typer", "click", "rich", "safetensors", "huggingface_hub"}
MODULES = 20  # modules that `import llmq` may load in addition to those of Python; currently 7

LOADED = "import json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
COUNTED = "import sys; before = len(sys.modules); import llmq; print(len(sys.modules) - before)"


def python(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)


def test_importing_llmq_loads_nothing_heavy() -> None:
    done = python(f"import sys, llmq; dir(llmq); llmq.__version__; {LOADED}")
    assert HEAVY & set(json.loads(done.stderr)) == set()


def test_importing_llmq_loads_few_modules() -> None:
    assert int(python(COUNTED).stdout) <= MODULES


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("quantize", "--help"), ("env", "--help"), ("quantize", "model", "--print-config")],
    ids=" ".join,
)
def test_help_version_and_settings_need_no_torch(arguments: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        "from llmq.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        f"{LOADED}"
    )
    done = python(program, *arguments)
    assert done.stdout
    assert {"torch", "transformers", "numpy"} & set(json.loads(done.stderr)) == set()


def test_a_command_prints_before_it_imports_torch() -> None:
    """Imports take seconds, in which a user would see nothing."""
    program = (
        "import sys; sys.modules['torch'] = None; from llmq.cli import app\n"
        "try: app(['quantize', 'model', 'out'], standalone_mode=False)\n"
        "except ImportError: print('reached torch')"
    )
    done = python(program)
    assert "loading torch and transformers" in done.stderr and "reached torch" in done.stdout
