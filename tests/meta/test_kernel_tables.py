"""The tables of kernels/README.md are those of the result files."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernel_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_tables", ROOT / "scripts" / "kernel_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_figures(kernel_tables: ModuleType) -> None:
    readme = kernel_tables.README.read_text(encoding="utf-8")
    expected = f"{kernel_tables.BEGIN}\n{kernel_tables.render()}\n{kernel_tables.END}"
    assert expected in readme, "run python scripts/kernel_tables.py"


def test_tables_without_results_report_not_measured(kernel_tables: ModuleType, tmp_path: Path) -> None:
    assert kernel_tables.render(tmp_path).count(kernel_tables.NOT_MEASURED) == 2


def test_a_gpu_is_shown_with_hardware_and_date(kernel_tables: ModuleType, tmp_path: Path) -> None:
    results = kernel_tables.results
    machine = {"kind": "result", "case": "machine", "result": {"name": "Some GPU", "driver_version": "1.2"}}
    found = {"status": "done", "records": [machine]}
    results.merge(tmp_path / "some-gpu-2026-01-02.json", "Some GPU", "2026-01-02", "environment", found)
    assert "### Some GPU, 2026-01-02, driver 1.2" in kernel_tables.render(tmp_path)
