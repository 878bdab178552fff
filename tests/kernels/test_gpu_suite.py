"""The GPU suite without a GPU: every section in the interpreter, and its failures."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from bench import results
from bench.gptq_steps import TOKENS_PER_BATCH
from llmq import job

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "scripts" / "gpu_suite.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return load(SUITE)


# ---- every section, end to end


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
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("environment", {"machine", "copy", "matmul"}),
        (
            "correctness",
            {"rounding", "float16 second moment", "float16 experts", "tests", "memcheck", "racecheck", "initcheck"},
        ),
        ("w4a16", {"tiny o float16 g32 M=1", "tiny down bfloat16 g128 sym M=2"}),
        ("gptq", {"hessian K=64", "factorize K=128", "round gate_up", "few blocks", "whole model"}),
        ("decode", {"bf16 memory", "packed memory", "bf16 batch 1 eager", "packed batch 2 eager"}),
    ],
)
def test_section_records_its_cases(
    interpreted: tuple["subprocess.CompletedProcess[str]", dict[str, object]], section: str, expected: set[str]
) -> None:
    assert expected <= results.cases(interpreted[1], section).keys()


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
    assert job.TOKENS_PER_BATCH["cuda"] == TOKENS_PER_BATCH


# ---- what goes wrong

FAKE = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("section")
for name in ("plan", "seconds", "records", "started"):
    parser.add_argument("--" + name)
arguments = parser.parse_args()
seen = open(arguments.records).read() if os.path.exists(arguments.records) else ""
def write(kind, case, **values):
    with open(arguments.records, "a") as file:
        file.write(json.dumps({"kind": kind, "case": case, **values}) + "\\n")
def case(name, trouble=None):
    if name in seen:
        return
    write("begin", name)
    if trouble == "hang":
        time.sleep(60)
    if trouble == "die":
        os._exit(11)
    write("result", name, result={"name": "a device"})
case("machine")
case("second", os.environ.get("TROUBLE"))
case("third")
if os.environ.get("TROUBLE") == "early":
    sys.exit("no such module")
"""


def run_fake(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, seconds: float = 30.0
) -> dict[str, object]:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    monkeypatch.setenv("TROUBLE", trouble)
    monkeypatch.setattr(suite, "SILENCE", 2.0)
    monkeypatch.setattr(suite, "TICK", 0.02)
    call = suite.Suite("full", tmp_path, time.monotonic() + 60, program=(sys.executable, str(program)))
    call.run("environment", seconds)
    content = results.read(call.path)
    assert call.path.name == f"a-device-{call.date}.json"
    return content


@pytest.mark.parametrize(("trouble", "reason"), [("hang", "hung"), ("die", "ended with 11")])
def test_case_that_ends_the_process_is_named_and_skipped(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, reason: str
) -> None:
    content = run_fake(suite, tmp_path, monkeypatch, trouble)
    assert results.cases(content, "environment").keys() == {"machine", "third"}
    (problem,) = results.problems(content, "environment")
    assert problem.startswith("second: ") and reason in problem


def test_section_out_of_time_keeps_its_records(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "GRACE", 0.5)
    content = run_fake(suite, tmp_path, monkeypatch, "hang", seconds=0.5)
    assert content["sections"]["environment"]["status"] == "out of time"  # type: ignore[index]
    assert results.cases(content, "environment").keys() == {"machine"}
    assert results.problems(content, "environment") == []


def test_section_that_always_fails_is_not_restarted(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = run_fake(suite, tmp_path, monkeypatch, "early")
    assert results.cases(content, "environment").keys() == {"machine", "second", "third"}
    assert any("no such module" in problem for problem in results.problems(content, "environment"))


def test_other_sections_of_the_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a-gpu-2026-01-02.json"
    first, second = ({"status": "done", "records": [{"kind": "result", "case": c, "result": {}}]} for c in "ab")
    results.merge(path, "a GPU", "2026-01-02", "w4a16", first)
    results.merge(path, "a GPU", "2026-01-02", "decode", second)
    results.merge(path, "a GPU", "2026-01-02", "w4a16", second)
    content = results.read(path)
    assert results.cases(content, "w4a16") == results.cases(content, "decode") == {"b": {}}


def test_newest_full_file_of_a_gpu_is_shown(tmp_path: Path) -> None:
    names = ("x-2026-01-02", "x-2026-02-01", "y-2025-12-31", "x-smoke-2026-03-01", "cpu-2026-04-01")
    for name in names:
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in results.gpu_files(tmp_path)] == ["x-2026-02-01", "y-2025-12-31"]
