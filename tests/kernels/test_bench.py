"""The parts of the measurements: sessions, clocks, contenders and tables."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from bench import (
    command_line,
    competitors,
    environment,
    gpu_tests,
    random_run,
    results,
    tables,
    timing,
    warm,
    weights,
)
from bench.gptq import STEPS, TUNING_STEPS
from bench.plan import PLANS
from bench.stopwatch import REST, Stopwatch, find, watching
from bench.timing import Contender, Spread, interleaved
from llmq.config import QuantConfig
from llmq_kernels.w4a16 import reference

CPU = torch.device("cpu")

# ---- measuring


def test_contenders_cycle_copies_and_report_failures() -> None:
    seen: list[int] = []

    def fails(_: int) -> None:
        raise NotImplementedError("no kernel for this")

    spreads, failed = interleaved(
        {"good": Contender(seen.append, 3), "bad": Contender(fails, 1)}, calls=5, replays=2, device=CPU
    )
    assert seen[-5:] == [0, 1, 2, 0, 1]
    assert spreads.keys() == {"good"}
    assert failed == {"bad": "NotImplementedError: no kernel for this"}


def test_graph_holds_whole_cycles_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: what is captured, and that nothing waits between the marks of a replay."""
    log: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("Stream", "CUDAGraph", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, **__: Recorder(name, log))
    run = timing._graph_run(Contender(log.append, 3), 5)
    begin, end = log.index("capture_begin"), log.index("capture_end")
    assert log[begin + 1 : end] == [0, 1, 2, 0, 1, 2]
    del log[:]
    assert run()() == pytest.approx(0.012 / 6)
    assert log == ["record", "replay", "record", "elapsed_time"]


class Recorder:
    """Notes the methods that are called on it; a stretch between two events is 12 ms."""

    def __init__(self, name: str, log: list[object]) -> None:
        self._name, self._log = name, log

    def __getattr__(self, method: str) -> Callable[..., float]:
        def call(*_: object) -> float:
            self._log.append(method)
            return 12.0

        return call


def test_a_spread_is_median_and_deciles() -> None:
    assert Spread.of([float(value) for value in range(11)]) == Spread(5.0, 1.0, 9.0)


def test_stopwatch_excludes_time_of_watched_callees() -> None:
    module = ModuleType("watched_program")
    clock = iter(range(100))
    exec("def inner(): pass\ndef outer(): inner(); inner()", vars(module))
    sys.modules[module.__name__] = module
    stopwatch = Stopwatch(lambda: float(next(clock)))  # every reading of the clock is one second later
    points = (("out", "watched_program:outer"), ("in", "watched_program:inner"), ("none", "watched_program:gone"))
    with watching(stopwatch, points) as missing:
        original = module.outer
        module.outer()
    assert stopwatch.taken() == {REST: 2.0, "out": 3.0, "in": 2.0}
    assert missing == ["watched_program:gone"]
    assert module.outer is not original


@pytest.mark.parametrize("point", [point for _, point in (*STEPS, *TUNING_STEPS)])
def test_stopwatch_names_functions_that_exist(point: str) -> None:
    assert find(point) is not None


def test_a_random_run_has_what_its_method_needs(tmp_path: Path) -> None:
    prepared = {
        method: random_run.prepare(PLANS["interpret"], tmp_path / method, 1, CPU, QuantConfig(method=method).stages)
        for method in ("gptq", "fast", "balanced")
    }
    streams = {method: run.streams for method, run in prepared.items()}
    assert all(run.method == QuantConfig(method=method).stages for method, run in prepared.items())
    assert [s is not None and s.floats is not None for s in streams.values()] == [False, True, True]
    assert [s is not None and s.token_weights is not None for s in streams.values()] == [False, False, True]
    assert [s.text.validation for s in streams.values() if s is not None] == [0, 1, 1]
    assert [run.fisher is not None for run in prepared.values()] == [False, False, True]
    assert find("llmq.formats.codecs.bit_packing:pack") is not None


def test_counters_of_the_profiler_are_parsed() -> None:
    names = ["ID", *environment.COUNTERS.values()]
    rows = [names, ["", "ns", "%", "%", "%"], ["0", "14,250.00", "61.5", "72.25", "40"]]
    text = "==PROF== connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    expected = {"microseconds": 14.25, "issue_slots": 61.5, "memory": 72.25, "warps": 40.0}
    assert environment.read_counters(text) == expected
    assert environment.read_counters("==ERROR== no permission") == {}


@pytest.mark.parametrize(("own", "wrong"), [(0.0104, False), (0.0106, True), (float("nan"), True)])
def test_divergence_on_the_device_is_within_five_per_cent_of_the_cpu(own: float, wrong: bool) -> None:
    compared = command_line.compared({"gptq-cuda": own, "gptq-cpu": 0.01}, "gptq", "cuda")
    assert compared["wrong"] is wrong
    alone = command_line.compared({"gptq-cuda": 0.01}, "gptq", "cuda")
    assert not alone["wrong"] and "no reference" in alone["summary"]


def test_cases_to_compile_are_valid() -> None:
    """Names only: nothing is launched."""
    names = [name for name, _ in warm.candidates(PLANS["full"], CPU)]
    assert len(names) == len(set(names)) >= 4 * 5


def test_exact_product_equals_the_reference() -> None:
    packed = weights.random_packed(9, 160, group=32, dtype=torch.float16, asymmetric=True, copies=2, device=CPU)
    x = torch.randn(3, 160, dtype=torch.float16)
    expected = reference.linear(x.numpy(), packed.weight(1).with_arrays(torch.Tensor.numpy), None)
    torch.testing.assert_close(weights.exact_product(x, packed, 1), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["naive_triton", "dequantize"])
def test_contenders_multiply_with_the_same_weight(name: str) -> None:
    packed = weights.random_packed(24, 128, group=32, dtype=torch.float16, asymmetric=True, copies=1, device=CPU)
    x = torch.randn(3, 128, dtype=torch.float16)
    prepared = competitors.ALL[name](packed, torch.float16, 1)
    error = weights.relative_error(prepared.multiply(1, x), weights.exact_product(x, packed))
    assert error < 2e-3  # the weight is rounded to fp16, 2**-11, and so is the product


def test_tinygemm_multiplies_with_the_same_weight() -> None:
    packed = weights.random_packed(64, 128, group=32, dtype=torch.bfloat16, asymmetric=True, copies=1, device=CPU)
    x = torch.randn(3, 128).to(torch.bfloat16)
    prepared = competitors.tinygemm(packed, torch.bfloat16, 1)
    assert weights.relative_error(prepared.multiply(0, x), weights.exact_product(x, packed)) < 2e-2


def test_copies_exceed_the_cache() -> None:
    assert [weights.copies_for(nbytes, 100) for nbytes in (200, 50, 30, 1)] == [2, 2, 4, 100]


# ---- reading what others print


@pytest.mark.parametrize(
    "line",
    [
        "tests/kernels/test_gpu_x.py::test_a[1-float16] FAILED            [ 50%]",
        "[gw3] [ 50%] FAILED tests/kernels/test_gpu_x.py::test_a[1-float16] ",
    ],
)
def test_pytest_outcomes_are_parsed_with_and_without_workers(line: str) -> None:
    reason = "FAILED tests/kernels/test_gpu_x.py::test_a[1-float16] - AssertionError: wrong by 1"
    outcome = gpu_tests.judged([line, reason], 1)
    assert outcome["failures"] == [
        {"test": "tests/kernels/test_gpu_x.py::test_a[1-float16]", "reason": "AssertionError: wrong by 1"}
    ]
    assert outcome["wrong"]


# ---- tables


def case(layer: str, M: int, **medians: float) -> dict[str, object]:
    times = {name: {"median": value, "p10": value, "p90": value} for name, value in medians.items()}
    about = {"model": "8B", "dtype": "bfloat16", "group": 128, "asymmetric": True, "layer": layer, "M": M}
    return {**about, "microseconds": times, "bytes": 1_000_000, "error": 1e-3}


def test_ratios_are_of_sums_over_the_layers() -> None:
    cases = [
        case("qkv", 1, llmq=10.0, cublas=30.0, tinygemm=12.0, gemlite=14.0),
        case("o", 1, llmq=5.0, cublas=15.0, tinygemm=9.0, gemlite=6.0),
        case("qkv", 16, llmq=10.0, cublas=30.0),  # `o` is missing: no row
    ]
    (table,) = tables.w4a16(cases, copy=4e12)
    assert len(table.rows) == 1
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["µs"], row["x cuBLAS"], row["x best of tinygemm, gemlite"]) == ("15.0", "3.00", "1.20")
    assert (row["x naive Triton"], row["GB/s"], row["of copy"]) == ("–", "133", "3%")


def test_tables_show_cases_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x-2026-01-01.json"
    records = [
        {"kind": "left out", "case": "70B o M=1"},
        {"kind": "error", "case": "streams", "error": "RuntimeError: no"},
    ]
    results.merge(path, "x", "2026-01-01", "w4a16", {"status": "out of time", "records": records[:1]})
    results.merge(path, "x", "2026-01-01", "correctness", {"status": "done", "records": records[1:]})
    shown = tables.report(results.read(path))
    assert "1 cases left out, from 70B o M=1 on" in shown
    assert "FAILED: streams" in shown
    assert results.problems(results.read(path), "w4a16") == []
    assert results.problems(results.read(path), "correctness") == ["streams: RuntimeError: no"]
