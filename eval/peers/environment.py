"""Environments for the peers, whose pinned versions conflict with each other and with llmq.

Peers with compatible versions share one environment. The environments are in `.venv-peers/` in the checkout, which git
ignores. An environment is complete if its marker file holds the requested requirements.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"
SHARED = "shared"
SHARED_REQUIREMENTS = [
    "torch==2.13.0",
    "transformers==5.23.0",
    "hqq==0.2.8.post1",
    "torchao==0.18.0",
    "xllamacpp==2026.10.11549",
]


class InstallError(Exception):
    """The package index, pip or a compiler failed; the message is the first line with the error."""


def interpreter(name: str, requirements: list[str]) -> Path:
    """The Python of the environment `name` with `requirements` installed; raises InstallError."""
    folder = ENVIRONMENTS / name
    python, marker = folder / "bin" / "python", folder / "requirements.json"
    if marker.is_file() and json.loads(marker.read_text()) == requirements:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements])
    marker.write_text(json.dumps(requirements))
    return python


def versions(python: Path, packages: list[str]) -> dict[str, str]:
    """Versions of those packages that are installed in the environment."""
    program = (
        "import json, sys, importlib.metadata as m; "
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    installed = json.loads(subprocess.run([str(python), "-c", program], capture_output=True, check=True).stdout)
    return {name: installed[name] for name in packages if name in installed}


def first_error(text: str) -> str:
    """The line with the reason in the output of a failed program: the last Python exception, or the first pip error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (raised[-1:] or errors or lines[-1:] or ["no output"])[0][:300]


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise InstallError(first_error(done.stderr))
