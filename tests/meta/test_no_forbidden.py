"""Forbidden in every file: swallowed errors, pickles, paths of one machine."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("llmq", "kernels", "scripts", "eval", "tests")
SHIPPED = ("llmq", "kernels", "scripts", "eval")
PEERS = "eval/peers/"  # run in separate environments, and read only files that they have just written

# A home folder or a mount that only some machine has, or where this checkout lies; not a part of a URL or of a path
# that is relative to something.
PLACES = ("/home", "/root", "/Users", "/mnt", "/scratch", "/workspace", str(ROOT.parent).rstrip("/"))
MACHINE_PATH = re.compile(rf"(?<![\w.:/~>-])({'|'.join(re.escape(place) for place in PLACES if place)})/[\w.-]+")


def parsed(folders: tuple[str, ...] = CODE) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def nodes_of_type(folders: tuple[str, ...], node_type: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for name, tree in parsed(folders):
        for node in ast.walk(tree):
            if isinstance(node, node_type):
                yield f"{name}:{getattr(node, 'lineno', 0)}", node


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file except this one that is tracked by git, or is untracked and not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs git and a checkout, to know which files are the project's")
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    files = [ROOT / name for name in listed if name]
    return [file for file in files if file.is_file() and file != Path(__file__).resolve()]


def test_no_bare_except() -> None:
    bare = [place for place, node in nodes_of_type(CODE, ast.ExceptHandler) if getattr(node, "type", None) is None]
    assert bare == []


def test_no_error_is_swallowed() -> None:
    swallowed = []
    for place, node in nodes_of_type(CODE, ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        if all(isinstance(line, ast.Pass) or _is_ellipsis(line) for line in node.body):
            swallowed.append(place)
    assert swallowed == []


def _is_ellipsis(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and line.value.value is ...


def test_no_code_loads_pickles() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    places = []
    for place, node in nodes_of_type(SHIPPED, ast.AST):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            names = {"pickle"} if node.value.id == "torch" else set()
        else:
            continue
        if names & modules and not place.startswith(PEERS):
            places.append(place)
    assert places == []


def test_no_machine_specific_path(tracked: list[Path]) -> None:
    assert _lines_with(MACHINE_PATH, tracked) == []


@pytest.mark.parametrize("text", ["cd /home/me/llmq", f"path = '{ROOT}/x'", "(/Users/me/x)"])
def test_machine_specific_paths_are_detected(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://x.org/home/page", "../mnt/file", "<repo>/mnt/x", "a/root/b"])
def test_relative_paths_and_urls_are_accepted(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def _lines_with(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    places = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                places.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return places
