"""The sweep: which rows are made, that none is made twice, and what the table and the picture say of them."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, writing into a folder of its own and quantizing nothing."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "eval" / "sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    for name in ("JSON", "MARKDOWN", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    monkeypatch.setattr(module, "texts", lambda model, folder: (folder, folder))
    monkeypatch.setattr(module, "run", lambda case, *paths: row(module, case))
    yield module
    for name in ("results", "rows", "stdlib_text"):
        sys.modules.pop(name, None)


def row(sweep: ModuleType, case: Any, **changes: Any) -> dict[str, Any]:
    bits = case.bits + 16 / case.group_size
    kl = 4.0**-case.bits * (1 + case.seed) * (2 if case.method == "rtn" else 1)
    stamp = dict.fromkeys(("date", "commit", "hardware", "torch"), "-")
    return {
        **sweep.asdict(case), "bits_per_weight": bits, "seconds": 1.0, "kl_mean": kl, "perplexity_ratio": 1.01,
        "same_top_1": 0.9, "float_perplexity": 7.0, "measured": stamp, **changes,
    }  # fmt: skip


QUICK = ["--methods", "rtn", "gptq", "--bits", "4", "3", "--group-sizes", "128"]


def test_a_method_that_sees_no_text_has_one_draw(sweep: ModuleType) -> None:
    cases = list(sweep.cases(sweep.parsed([*QUICK, "--seeds", "3"])))
    assert len(cases) == len(set(cases)) == 2 + 2 * 3
    assert [case.seed for case in cases if case.method == "rtn"] == [0, 0]


def test_unless_it_is_named_a_slow_method_is_run_once(sweep: ModuleType) -> None:
    slow = [case for case in sweep.cases(sweep.parsed(["--group-sizes", "64"])) if case.method == "best"]
    assert [(case.bits, case.seed) for case in slow] == ([(4, 0)] if "best" in sweep.METHODS else [])
    named = list(sweep.cases(sweep.parsed(["--methods", "gptq", "--group-sizes", "64"])))
    assert len(named) == 4


def test_a_row_that_is_there_is_not_made_again(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def killed_at_the_third(case: Any, *paths: Path) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(case)
        return row(sweep, case)

    arguments = sweep.parsed([*QUICK, "--seeds", "2"])
    monkeypatch.setattr(sweep, "run", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(arguments)
    assert len(json.loads(sweep.JSON.read_text())) == 2
    monkeypatch.setattr(sweep, "run", lambda case, *paths: made.append(case) or row(sweep, case))
    sweep.sweep(arguments)
    sweep.sweep(arguments)
    assert len(made) == len(set(made)) == len(json.loads(sweep.JSON.read_text())) == 6


def test_draws_become_a_mean_and_a_range(sweep: ModuleType) -> None:
    sweep.sweep(sweep.parsed(["--methods", "rtn", "gptq", "--bits", "4", "--group-sizes", "128", "--seeds", "3"]))
    rtn, gptq = sweep.points(sweep.read(sweep.JSON))
    assert gptq.kl == (2 / 256, 1 / 256, 3 / 256)
    table = sweep.render(sweep.read(sweep.JSON))
    assert "| gptq | 3 | 4.125 | 0.00781 [0.00391, 0.01172] | 100% | 1.0100 | 90.00% | 1.0 |" in table
    assert "| rtn | 1 | 4.125 | 0.00781 | 100% |" in table


def test_a_front_holds_what_nothing_beats(sweep: ModuleType) -> None:
    def point(bits: float, kl: float) -> Any:
        return sweep.Point("m", "gptq", 4, 128, True, ({"bits_per_weight": bits, "kl_mean": kl},))

    best, worse, most = point(4.0, 0.2), point(4.5, 0.3), point(5.0, 0.1)
    assert sweep.front([most, worse, best]) == [best, most]


def test_the_picture_is_small(sweep: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    sweep.sweep(sweep.parsed(["--methods", "rtn", "gptq", "fast", "--bits", "2", "3", "4", "8", "--seeds", "2"]))
    sweep.draw(sweep.read(sweep.JSON), sweep.PICTURE)
    first = sweep.PICTURE.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) < 100_000
    sweep.draw(sweep.read(sweep.JSON), sweep.PICTURE)
    assert sweep.PICTURE.read_bytes() == first


def test_what_is_published_is_rendered_from_the_figures() -> None:
    folder = ROOT / "eval"
    if not (folder / "results" / "sweep.json").exists():
        pytest.skip("eval/sweep.py was not run")
    sys.path.insert(0, str(folder))
    try:
        import sweep as published  # type: ignore[import-not-found]

        assert (folder / "results" / "sweep.md").read_text(encoding="utf-8") == published.render(
            published.read(published.JSON)
        )
    finally:
        sys.path.remove(str(folder))
        for name in ("sweep", "results", "rows", "stdlib_text"):
            sys.modules.pop(name, None)
