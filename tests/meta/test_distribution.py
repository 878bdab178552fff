"""The name under which llmq is installed: `llmq` on the package index is another project."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "llmq-quantize"
# A hint to install a package named llmq, with or without extras; paths such as ./llmq are not packages.
WRONG = re.compile(r"(?:pip|uv pip|uv) install[^\n\"]*?[ '\"]llmq(?:\[|['\"\s`]|$)")


def test_the_distribution_has_its_own_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == NAME
    assert not any(requirement.startswith("triton") for requirement in project["dependencies"])  # CPU users need none


def test_no_hint_installs_another_project() -> None:
    assert WRONG.search("pip install 'llmq[plots]'") and WRONG.search("pip install -U llmq\n")
    assert not WRONG.search(f"pip install '{NAME}[plots]'")
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += [file for folder in ("llmq", "kernels", "scripts", "eval") for file in (ROOT / folder).rglob("*.py")]
    wrong = [str(file.relative_to(ROOT)) for file in files if WRONG.search(file.read_text(encoding="utf-8"))]
    assert not wrong
