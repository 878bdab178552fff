"""The GPU suite without a GPU: every section in the interpreter, and its failures."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from bench import results
from bench.gptq_steps import TOKENS_PER_BATCH
from llmq import memory
from llmq_kernels.w4a16 import configs

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "scripts" / "gpu_suite.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return load(SUITE)


@pytest.fixture(scope="module")
def interpreted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple["subprocess.CompletedProcess[str]", dict[str, object]]:
    """The output and the result file of the whole suite on a CPU."""
    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, str(SUITE), "--interpret", "--out", str(out), "--budget", "560"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, env=environment, check=False)
    assert [path.suffix for path in out.iterdir()] == [".json"], done.stdout + done.stderr
    return done, results.read(next(out.iterdir()))


@pytest.mark.slow
def test_suite_finishes_every_section_without_problems(
    suite: ModuleType, interpreted: tuple["subprocess.CompletedProcess[str]", dict[str, dict[str, dict[str, str]]]]
) -> None:
    done, content = interpreted
    assert {name: entry["status"] for name, entry in content["sections"].items()} == dict.fromkeys(
        suite.SECTIONS, "done"
    )
    assert "nothing wrong" in done.stdout
    assert done.returncode == 0


@pytest.mark.slow
def test_gptq_section_times_every_step(
    interpreted: tuple["subprocess.CompletedProcess[str]", dict[str, object]],
) -> None:
    cases = results.cases(interpreted[1], "gptq")
    always = {"forward", "hessian", "factorize", "search scales", "round", "pack", "save"}
    for method, more in {"gptq": set(), "fast": {"target", "descent", "judge"}, "balanced": {"tune block"}}.items():
        few = cases[f"few blocks {method}"]
        assert few["not_watched"] == []
        assert always | more <= few["steps"].keys()
        assert (few["preparation_seconds"] is None) == (method != "balanced")
    assert cases["tuning"]["not_watched"] == [] and cases["tuning"]["step_seconds"] > 0


@pytest.mark.slow
def test_command_line_is_compared_with_the_cpu(
    interpreted: tuple["subprocess.CompletedProcess[str]", dict[str, object]],
) -> None:
    cases = results.cases(interpreted[1], "command_line")
    assert cases["gptq against the CPU"]["difference"] == 0.0  # both ran on the CPU
    assert cases["load"]["error"] == 0.0
    assert cases["generate"]["text"]


def test_dry_run_lists_the_sections_by_value(suite: ModuleType) -> None:
    done = subprocess.run([sys.executable, str(SUITE), "--dry-run"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == list(suite.SECTIONS)
    assert [line[2] for line in lines][:2] == ["environment", "command_line"]
    assert sum(float(line[0]) for line in lines) <= suite.BUDGET <= 500
    assert all(line[3] for line in lines)


def test_sections_share_the_time_that_is_left(suite: ModuleType) -> None:
    shared = suite.schedule({"environment", "gptq", "gpu_tests"}, 81.0)
    assert list(shared) == ["environment", "gptq", "gpu_tests"]
    assert sum(shared.values()) == pytest.approx(81.0)
    assert shared["gptq"] / shared["environment"] == pytest.approx(
        suite.SECTIONS["gptq"] / suite.SECTIONS["environment"]
    )


def test_tuned_tile_sizes_are_used_by_later_sections(suite: ModuleType, tmp_path: Path) -> None:
    assert configs.VARIABLE not in suite.environment("full")
    assert suite.environment("full", tmp_path / "x.json")[configs.VARIABLE] == str(tmp_path / "x.json")


def test_interpreted_figures_are_not_published(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SUITE), "--interpret"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_batches_are_those_of_the_command() -> None:
    assert memory.TOKENS_PER_BATCH_TO_QUANTIZE["cuda"] == TOKENS_PER_BATCH


def test_newest_full_file_of_a_gpu_is_shown(tmp_path: Path) -> None:
    names = ("x-2026-01-02", "x-2026-02-01", "y-2025-12-31", "x-smoke-2026-03-01", "cpu-2026-04-01")
    for name in names:
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in results.gpu_files(tmp_path)] == ["x-2026-02-01", "y-2025-12-31"]
