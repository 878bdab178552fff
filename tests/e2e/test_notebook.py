"""The notebook of the documentation: its cells run in order, offline, on the bundled model."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    return [{**cell, "source": "".join(cell["source"])} for cell in document["cells"]]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last else None


def test_it_is_stored_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    values = [run(cell["source"], names) for cell in cells() if cell["cell_type"] == "code"]
    shown = [value for value in values if hasattr(value, "_repr_html_")]
    assert [type(value).__name__ for value in shown] == ["Report", "Measurement", "Verification", "Conversion"]
    assert all("<table>" in value._repr_html_() for value in shown)
    assert names["measured"].model.kl_mean < 0.02
    assert "def read_lines(path):" in capsys.readouterr().out
