"""The names that `import llmq` gives: listed, sorted, documented, and imported from the declared module."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import llmq

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in llmq.__all__ if not name.startswith("__")]


def test_list_is_sorted_without_duplicates() -> None:
    assert llmq.__all__ == sorted(set(llmq.__all__))


def test_dir_shows_the_list() -> None:
    assert dir(llmq) == sorted(llmq.__all__)


@pytest.mark.parametrize("name", llmq.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(llmq, name) is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented_by_hand(name: str) -> None:
    value = getattr(llmq, name)
    assert value.__doc__, name
    text = inspect.getdoc(value) or ""
    assert not dataclasses.is_dataclass(value) or not text.startswith(f"{name}("), "the docstring is generated"


@pytest.mark.parametrize("name", NAMES)
def test_lazy_imports_match_the_imports_for_type_checkers(name: str) -> None:
    """The names are loaded lazily, so they are declared twice: for Python and for type checkers."""
    tree = ast.parse((ROOT / "llmq" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    lines = [line for line in checked.body if isinstance(line, ast.ImportFrom)]
    homes = {alias.name: line.module for line in lines for alias in line.names}
    assert set(homes) == set(NAMES)
    assert getattr(importlib.import_module(str(homes[name])), name) is getattr(llmq, name)


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        llmq.quantise  # noqa: B018
