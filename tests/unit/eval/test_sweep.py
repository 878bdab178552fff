"""The sweep: its table and its picture."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, writing into a separate folder without quantizing."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "eval" / "sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep", module)  # dataclasses look up their module here
    spec.loader.exec_module(module)
    for name in ("JSON", "MARKDOWN", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    monkeypatch.setattr(module, "texts", lambda model, folder: (folder, folder))
    monkeypatch.setattr(module, "run", lambda case, *paths: row(module, case))
    yield module
    for name in ("results", "rows", "stdlib_text"):
        sys.modules.pop(name, None)


def row(sweep: ModuleType, case: Any) -> dict[str, Any]:
    bits = case.bits + 16 / case.group_size
    kl = 4.0**-case.bits * (1 + case.seed) * (2 if case.method == "rtn" else 1)
    stamp = dict.fromkeys(("date", "commit", "hardware", "torch"), "-")
    return {
        **sweep.asdict(case), "bits_per_weight": bits, "seconds": 1.0, "kl_mean": kl, "perplexity_ratio": 1.01,
        "same_top_1": 0.9, "float_perplexity": 7.0, "measured": stamp,
    }  # fmt: skip


def test_table_has_mean_and_range_of_draws(sweep: ModuleType) -> None:
    sweep.sweep(sweep.parsed(["--methods", "rtn", "gptq", "--bits", "4", "--group-sizes", "128", "--seeds", "3"]))
    rtn, gptq = sweep.points(sweep.read(sweep.JSON))
    assert gptq.kl == (2 / 256, 1 / 256, 3 / 256)
    table = sweep.render(sweep.read(sweep.JSON))
    assert "| gptq | 3 | 4.125 | 0.00781 [0.00391, 0.01172] | 100% | 1.0100 | 90.00% | 1.0 |" in table
    assert "| rtn | 1 | 4.125 | 0.00781 | 100% |" in table


def test_front_holds_points_that_no_other_beats(sweep: ModuleType) -> None:
    def point(bits: float, kl: float) -> Any:
        return sweep.Point("m", "gptq", 4, 128, True, ({"bits_per_weight": bits, "kl_mean": kl},))

    best, worse, most = point(4.0, 0.2), point(4.5, 0.3), point(5.0, 0.1)
    assert sweep.front([most, worse, best]) == [best, most]
