"""Small files and short functions: what can be read in one go is read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("llmq", "kernels", "scripts", "eval")
FILE_LINES, FUNCTION_LINES = 320, 70  # the aim is 300 and 25


def files() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length in lines, decorators and docstring included, of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def test_there_is_something_to_measure() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in files()} >= {"llmq", "kernels", "scripts"}


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_and_its_functions_are_small(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE_LINES
    assert {name: lines for name, lines in functions(source) if lines > FUNCTION_LINES} == {}
