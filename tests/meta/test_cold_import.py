"""`import llmq` and `llmq --help` are fast: they import neither torch nor any other heavy package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "pydantic", "typer", "click", "rich", "safetensors", "huggingface_hub"}
MODULES_OF_A_COMMAND = 200  # until its first line, in addition to those of typer and llmq.cli; currently 150
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


# Each command runs in a copy of one process, which ends with its first output.
FIRST_LINES = """
import json, os, sys
import llmq, typer.rich_utils
from llmq.cli import main, options
before = set(sys.modules)

class First:
    encoding = "utf-8"
    def write(self, text):
        modules = sorted({name.split(".")[0] for name in set(sys.modules)})
        os.write(1, (json.dumps([sys.argv[1], text, len(set(sys.modules) - before), modules]) + "\\n").encode())
        os._exit(0)
    def flush(self): pass
    def isatty(self): return False

for words in json.loads(sys.argv[1]):
    copy = os.fork()
    if not copy:
        sys.argv, sys.stdout, sys.stderr = ["llmq", *words], First(), First()
        main()
        os._exit(1)
    os.waitpid(copy, 0)
"""
STARTED = {
    "quantize": "model out", "plan": "model", "sensitivity": "model", "train": "model out --data text.txt",
    "merge": "model adapter out", "convert": "out new --to gptq", "push": ". owner/name", "report": "out",
    "eval": "out", "verify": "out", "inspect": "out", "env": "", "generate": "out --prompt x", "chat": "out",
    "serve": "out", "bench": "out",
}  # fmt: skip
SLOW = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "jinja2", "accelerate", "gguf", "datasets"}


def test_every_command_prints_before_it_imports_anything_slow() -> None:
    """Imports take seconds, in which a user would see nothing."""
    words = [[name, *arguments.split()] for name, arguments in STARTED.items()]
    lines = [json.loads(line) for line in python(FIRST_LINES, json.dumps(words)).stdout.splitlines()]
    assert [name for name, *_ in lines] == list(STARTED)
    for name, text, count, modules in lines:
        assert "loading torch and transformers" in text, (name, text)
        assert SLOW & set(modules) == set(), name
        assert count <= MODULES_OF_A_COMMAND, (name, count)


def test_the_first_line_of_every_command_is_tested() -> None:
    assert set(STARTED) == {file.stem for file in (ROOT / "llmq" / "cli").glob("*.py") if has_command(file)}


def has_command(file: Path) -> bool:
    return "\ndef command(" in file.read_text("utf-8")
