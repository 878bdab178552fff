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
    command = [sys.executable, str(SUITE), "--interpret", "--out", str(out), "--budget", "400"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
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
    few = results.cases(interpreted[1], "gptq")["few blocks"]
    assert few["not_watched"] == []
    assert {"forward", "hessian", "factorize", "search scales", "round", "pack", "save"} <= few["steps"].keys()


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
