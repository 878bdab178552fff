"""Engines in separate processes: each has its own memory, and may have its own Python environment."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import BackendError, ConfigError, listed

CHILDREN = Path(__file__).parent / "children"
ROOT = Path(__file__).parents[2]  # the folder of the package llmq
LAST_LINES = 12  # of the messages of an engine that failed


@dataclass(frozen=True)
class Engine:
    """How an engine is called: on the command line, in the tables of llmq, in Python, and by pip."""

    name: str
    title: str
    module: str
    package: str

    @property
    def child(self) -> str:
        return self.name.replace(".", "_")

    def is_here(self) -> bool:
        """Whether this Python has it."""
        return importlib.util.find_spec(self.module) is not None


LLMQ = Engine("llmq", "transformers", "llmq", "llmq-quantize")
TRANSFORMERS = Engine("transformers", "transformers", "transformers", "transformers")
VLLM = Engine("vllm", "vLLM", "vllm", "vllm")
LLAMA_CPP = Engine("llama.cpp", "llama.cpp", "xllamacpp", "xllamacpp")
MLX = Engine("mlx", "MLX", "mlx_lm", "mlx-lm")
ONNX = (
    Engine("onnxruntime", "ONNX Runtime", "onnxruntime", "onnxruntime"),
    Engine("openvino", "OpenVINO", "openvino", "openvino"),
)
ENGINES = {engine.name: engine for engine in (LLMQ, TRANSFORMERS, VLLM, LLAMA_CPP, MLX, *ONNX)}


def engine_named(name: str) -> Engine:
    """The engine with a name; raises ConfigError."""
    if name not in ENGINES:
        raise ConfigError(f"engine is {name!r}, expected one of {listed(ENGINES)}", hint="check the spelling")
    return ENGINES[name]


def ask(engine: Engine, request: Mapping[str, Any], python: str | None = None) -> dict[str, Any]:
    """Start a process of an engine, and return its answer to a request (see children/__main__.py).

    python  the Python of another environment; None for this one

    Raises BackendError if the engine is not installed there, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [python or sys.executable, str(CHILDREN), engine.child, str(answer)]
        root = None if python else str(ROOT)
        done = _run(command, {**request, "root": root}, _environment(python))
        if not answer.is_file():
            ended = f"{engine.name} ended with exit code {done.returncode} and no result"
            said = "\n".join(line for line in done.stderr.splitlines() if line.strip()) or "nothing"
            raise BackendError(f"{ended}; its last messages:\n{_end(said)}", hint="see the messages of the engine")
        answered: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "missing" in answered:
        absent = answered["missing"] or engine.module
        raise BackendError(
            f"{engine.name} cannot run in {python or 'this environment'}: it has no module {absent!r}",
            hint=f"{python or 'python'} -m pip install {engine.package}, or name the Python of another environment "
            "with --engine-python",
        )
    return answered


def _run(
    command: list[str], request: Mapping[str, Any], environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise BackendError(
            f"{command[0]} cannot be started: {error.strerror or error}",
            hint="give the python of an environment, such as /path/to/environment/bin/python",
        ) from error


def _environment(python: str | None) -> dict[str, str]:
    """The variables of a process: this Python finds the packages of this process, another one has its own."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if python is None:
        variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    return variables


def _end(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_LINES:])
