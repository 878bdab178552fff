"""Build the documentation as a site: python scripts/site.py FOLDER

mkdocs builds the pages of one folder. Pages of llmq are in several folders and link to each other, also on GitHub, so
they are copied with their folders first. A link that leads nowhere, or a page that is missing in mkdocs.yml, is an
error. Needs the dependency group `docs`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*", "kernels/README.md", "eval/*.md", "eval/results/*", "eval/peers/results/*")
FILES = ("LICENSE",)  # that pages link to
KINDS = (".md", ".svg", ".png", ".json", ".ipynb")


def copied(folder: Path) -> None:
    """Copy all pages, and the pictures and data next to them."""
    files = [file for pattern in PAGES for file in ROOT.glob(pattern) if file.suffix in KINDS]
    for file in (*files, *(ROOT / name for name in FILES)):
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def build(site: Path) -> int:
    """Build the site; returns mkdocs' exit code."""
    with tempfile.TemporaryDirectory() as pages:
        copied(Path(pages))
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file",
                   str(ROOT / "mkdocs.yml"), "--site-dir", str(site.resolve())]  # fmt: skip
        # MkDocs Material prints an advertisement for its successor unless this is set.
        return subprocess.run(
            command, env={**os.environ, "LLMQ_PAGES": pages, "NO_MKDOCS_2_WARNING": "1"}, check=False
        ).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.exit(build(parser.parse_args().folder))
