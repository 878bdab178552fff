"""Out of memory in the middle of a run: the run continues more economically, and writes the same bytes."""

import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmq import memory, pipeline
from llmq.errors import BackendError
from llmq.memory import Economy
from llmq.methods import METHODS, Method, Tuning
from llmq.model.passes.hidden_states import Place
from llmq.steps import fisher_information
from llmq.steps.end_to_end import memory_plan, session
from llmq.steps.run import Run
from tests import runs

BLOCKS, SAMPLES = 3, 9
STAGES = {
    "both streams": METHODS["fast"],
    "transformed, tuned": Method(
        transforms=("awq",), rounding="clip", block_tuning=Tuning(3, 0.01, 0.02, 48), validation=0.25
    ),
}
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError(),
}


def address_space() -> Exception:
    """The error of a real allocation, with a limit on address space that is a little above what the process uses."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), before[1]))
    try:
        torch.empty(1 << 30, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    raise AssertionError("the allocation did not fail")


if sys.platform == "linux":
    ERRORS["address space"] = address_space


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four sequences, so that half a batch is two; the last batch is shorter."""
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_QUANTIZE", {"cpu": 4 * 48})


@pytest.mark.parametrize("stages", STAGES)
def test_every_step_of_economy_gives_the_same_bytes(
    stages: str, checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama", dtype="bfloat16")
    settings: dict[str, Any] = {"stages": STAGES[stages], "samples": SAMPLES}
    whole = runs.quantize(model, tmp_path / "whole", text, **settings)
    failing = {1: "cuda", 2: "address space" if "address space" in ERRORS else "cpu"}  # block -> its first attempt
    seen: list[tuple[int, bool, Place, int]] = []
    quantize_groups = pipeline.quantize_groups

    def quantize(run: Run, block: Any, *arguments: Any) -> None:
        assert run.streams is not None
        stream = run.streams.quantized
        seen.append((block.index, stream.text.in_parts, stream._storage.place, len(stream.text.batches()[0])))
        quantize_groups(run, block, *arguments)
        if block.index in failing:
            raise ERRORS[failing.pop(block.index)]()

    monkeypatch.setattr(pipeline, "quantize_groups", quantize)
    report = runs.quantize(model, tmp_path / "out", text, **settings)
    assert runs.files_of(tmp_path / "out") == runs.files_of(tmp_path / "whole")
    assert report.layers == whole.layers and [block.gains for block in report.blocks] == [b.gains for b in whole.blocks]
    plans = {index: plan for index, *plan in seen}
    assert plans == {0: [False, Place.HOST, 4], 1: [True, Place.HOST, 2], 2: [True, Place.FILE, 2]}
    notes = [note for note in report.notes if note.startswith("out of memory")]
    assert ["half the tokens" in notes[0], "hidden states in files" in notes[1], len(notes)] == [True, True, 2]
    assert "CUDA out of memory" in notes[0] and "allocate memory" in notes[1]


def test_a_run_that_needs_more_memory_in_any_case_ends_with_a_message(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_groups, attempts = pipeline.quantize_groups, []

    def quantize(run: Run, block: Any, *arguments: Any) -> None:
        quantize_groups(run, block, *arguments)
        if block.index == 1:
            attempts.append(run)
            raise ERRORS["cpu"]()

    monkeypatch.setattr(pipeline, "quantize_groups", quantize)
    model = checkpoint("llama", dtype="bfloat16")
    with pytest.raises(BackendError, match="out of memory, although hidden states are kept in files") as error:
        runs.quantize(model, tmp_path / "out", text, method="gptq")
    assert len(attempts) == 3 and "finished blocks are kept" in error.value.hint
    monkeypatch.undo()
    assert [block.resumed for block in runs.quantize(model, tmp_path / "out", text, method="gptq").blocks][0]


@pytest.mark.parametrize("name", ERRORS)
def test_failed_allocations_are_recognized(name: str) -> None:
    assert memory.is_out_of_memory(ERRORS[name]())


def test_other_errors_are_raised_at_once() -> None:
    attempts, calls = memory.Attempts(torch.device("cpu"), print), []
    with pytest.raises(RuntimeError, match="shapes"):
        for economy in attempts:
            calls.append(economy)
            with attempts.within_memory():
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert calls == [Economy.NONE]


def test_a_gpu_tries_main_memory_before_files() -> None:
    notes, calls = list[str](), list[Economy]()
    attempts = memory.Attempts(torch.device("meta"), notes.append)
    for economy in attempts:
        calls.append(economy)
        with attempts.within_memory():
            if economy is not Economy.STATES_IN_FILES:
                raise ERRORS["python"]()
    assert calls == list(Economy) and len(notes) == 3


TUNED = replace(
    METHODS["best"],
    block_tuning=Tuning(2, 0.0, 0.02, 48, fisher=True),
    tuning=Tuning(4, 1e-3, 1e-3, 48),
    written=0,
    validation=0.25,
)


def failing_once(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, at: int) -> list[int]:
    """Let call number `at` of a function run out of memory; the list has the numbers of all calls."""
    function, calls = getattr(place, name), list[int]()

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            raise ERRORS["cpu"]()
        return function(*arguments, **options)

    monkeypatch.setattr(place, name, called)
    return calls


def test_fisher_information_and_end_to_end_tuning_try_again(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fisher information that was measured is not measured again, and tuning reads its blocks from disk."""
    model, settings = checkpoint("llama", num_hidden_layers=2), {"stages": TUNED, "samples": 4}
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_WEIGH", 2 * 48)
    runs.quantize(model, tmp_path / "whole", text, **settings)
    slopes = failing_once(monkeypatch, fisher_information, "drawn_slope", 2)
    groups = failing_once(monkeypatch, pipeline, "quantize_groups", 3)
    losses = failing_once(monkeypatch, session, "kl_loss", 3)
    measured = failing_once(monkeypatch, fisher_information, "measure", 0)
    chosen = list[tuple[Economy, bool]]()
    choose = memory_plan.choose

    def plan(run: Run, *arguments: Any) -> Any:
        chosen.append((run.economy, choose(run, *arguments).packed_in_memory))
        return choose(run, *arguments)

    monkeypatch.setattr(memory_plan, "choose", plan)
    monkeypatch.setattr(memory.Attempts, "__init__", patient(memory.Attempts.__init__))
    report = runs.quantize(model, tmp_path / "out", text, **settings)
    assert runs.files_of(tmp_path / "out") == runs.files_of(tmp_path / "whole")
    assert len(measured) == 2 and len(slopes) > 2 and len(groups) > 3 and len(losses) > 3
    assert chosen[0][0] > Economy.NONE and not any(in_memory for _, in_memory in chosen[1:])
    assert sum(note.startswith(memory.RETRIED) for note in report.notes) == 3


def patient(start: Callable[..., None]) -> Callable[..., None]:
    """All steps of a GPU, which has one more than a CPU."""

    def started(self: memory.Attempts, *arguments: Any) -> None:
        start(self, *arguments)
        self._steps = list(Economy)

    return started
