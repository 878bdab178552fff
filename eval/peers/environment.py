"""Environments for the peers: their pins contradict each other's, and llmq's.

Those whose pins agree share one.  They lie in `.venv-peers/` beside the code, which git does not see, and are made
once.  An environment counts as made when its marker file holds the requirements that are asked for.
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
    """The package index, pip or a compiler says no; the message is the first line that names the error."""


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
    """Versions of the packages that are in the environment."""
    program = (
        "import json, sys, importlib.metadata as m; "
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.run([str(python), "-c", program], capture_output=True, check=True).stdout)
    return {name: found[name] for name in packages if name in found}


def first_error(text: str) -> str:
    """The line of a failed program's output that says why: where Python gave up, else where pip first says error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    naming = [line for line in lines if line.lower().startswith("error")]
    return (raised[-1:] or naming or lines[-1:] or ["no output"])[0][:300]


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise InstallError(first_error(done.stderr))
