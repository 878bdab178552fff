"""Generated pages, and generated parts of pages, are up to date with the code and the results."""

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated_documents", ROOT / "scripts" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_page_with_other_text_is_stale(docs: ModuleType, tmp_path: Path) -> None:
    page, wanted = tmp_path / "page.md", "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb\n"
    page.write_text(wanted.replace("new", "old"))
    assert docs.replaced(page.read_text(), "x", "new") == wanted
    assert docs.stale(iter([(page, wanted)])) == [(page, wanted)]
    page.write_text(wanted)
    assert docs.stale(iter([(page, wanted)])) == []


def test_a_page_without_markers_is_refused(docs: ModuleType) -> None:
    with pytest.raises(ValueError, match="no lines <!-- begin: x -->"):
        docs.replaced("a page\n<!-- end: x -->\n", "x", "new")


def test_the_tree_has_a_sentence_for_every_file(docs: ModuleType) -> None:
    entries = list(docs.tree_entries(ROOT / "llmq", 0))
    files = [name.strip() for name, _ in entries if name.endswith(".py")]
    assert sorted(files) == sorted(f.name for f in (ROOT / "llmq").rglob("*.py") if f.name != "__init__.py")
    assert [name.strip() for name, sentence in entries if not sentence] == []


def test_the_page_of_models_has_every_class_of_transformers(docs: ModuleType) -> None:
    assert docs  # it sets the path
    import architecture_page

    from tests.toy_configs import entries

    rows = architecture_page.read(architecture_page.JSON)
    listed = {(row["mapping"], row["type"], row["class"]) for row in rows}
    if {f"transformers {version('transformers')}"} == {row["versions"][0] for row in rows}:
        assert listed == {(line.mapping, line.model_type, line.model_class) for line in entries()}
    page = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
    shown = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(shown) == sorted(row["type"] for row in rows)


def test_no_measured_class_is_wrong(docs: ModuleType) -> None:
    assert docs
    import architecture_page

    assert architecture_page.problems(architecture_page.read(architecture_page.JSON), 1e-4) == []


def test_kernels_that_were_not_measured_are_marked(docs: ModuleType, tmp_path: Path) -> None:
    assert docs.kernels(tmp_path).count("not measured yet") == 2


def test_kernel_tables_show_hardware_and_date(docs: ModuleType, tmp_path: Path) -> None:
    from bench import results

    machine = {"kind": "result", "case": "machine", "result": {"name": "Some GPU", "driver_version": "1.2"}}
    section = {"status": "done", "records": [machine]}
    results.merge(tmp_path / "some-gpu-2026-01-02.json", "Some GPU", "2026-01-02", "environment", section)
    assert "### Some GPU, 2026-01-02, driver 1.2" in docs.kernels(tmp_path)
