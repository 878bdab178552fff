"""Documents that are generated say what the figures say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "eval" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_page_is_rendered_from_the_figures(results: ModuleType) -> None:
    figures = json.loads(results.JSON.read_text(encoding="utf-8"))
    assert results.MARKDOWN.read_text(encoding="utf-8") == results.render(figures)


def test_readme_shows_the_figures(results: ModuleType) -> None:
    figures = json.loads(results.JSON.read_text(encoding="utf-8"))
    readme = results.README.read_text(encoding="utf-8")
    assert f"{results.BEGIN}\n{results.summary(figures)}\n{results.END}" in readme


def test_every_named_document_is_there() -> None:
    for name in (
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/ARCHITECTURE.md",
        "docs/FORMATS.md",
        "eval/LOG.md",
    ):
        assert (ROOT / name).is_file(), name
