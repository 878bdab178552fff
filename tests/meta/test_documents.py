"""Documents that are generated say what the figures say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "eval"


def module(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program beside its neighbours, which it imports by their bare names."""
    for folder in (EVAL, EVAL / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"document_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    for name in ("subjects", "rows", "table"):
        sys.modules.pop(name, None)
    return found


def test_readme_shows_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = module(EVAL / "peers" / "readme_table.py", monkeypatch)
    readme = shown.README.read_text(encoding="utf-8")
    assert f"{shown.BEGIN}\n{shown.table(shown.read())}\n{shown.END}" in readme


@pytest.mark.parametrize("name", ["tiny-python-llama", "tiny-python-qwen3", "babyllama-tok361-pad384"])
def test_tables_beside_the_peers_are_rendered_from_the_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = module(EVAL / "peers" / "table.py", monkeypatch)
    figures = json.loads((EVAL / "peers" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    page = EVAL / "peers" / "results" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == table.render(figures)


def test_the_ablation_is_rendered_from_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = module(EVAL / "ablation.py", monkeypatch)
    rows, domains = ablation.read(ablation.JSON), ablation.read(ablation.DOMAINS_JSON)
    assert rows
    assert ablation.MARKDOWN.read_text(encoding="utf-8") == ablation.render(rows, domains)


def test_the_rules_of_serving_engines_are_those_that_verify_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = module(ROOT / "scripts" / "serving_rules.py", monkeypatch)
    page = rules.PAGE.read_text(encoding="utf-8")
    assert f"{rules.BEGIN}\n{rules.render()}\n{rules.END}" in page, "run python scripts/serving_rules.py"


def test_the_page_of_architectures_has_a_row_for_each() -> None:
    from tests.architectures import ARCHITECTURES, LEFT_OUT

    page = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [*ARCHITECTURES, *LEFT_OUT]


def test_the_formats_are_rendered_from_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = module(EVAL / "formats.py", monkeypatch)
    assert formats.MARKDOWN.read_text(encoding="utf-8") == formats.render(formats.read(formats.JSON))


def test_every_named_document_is_there() -> None:
    for name in (
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/ARCHITECTURE.md",
        "docs/FORMATS.md",
        "docs/SERVING.md",
        "eval/LOG.md",
    ):
        assert (ROOT / name).is_file(), name
