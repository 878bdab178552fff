"""End-to-end tuning: a lower validation loss, the same bits after any interruption, and no leftover files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmq
from llmq import memory
from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_divergence import kl_divergence
from llmq.algorithms.kl_tuning import drawn
from llmq.checkpoint.tuned_version import Revision
from llmq.config import QuantConfig
from llmq.errors import CalibrationError, LlmqError
from llmq.export import save
from llmq.job import Job
from llmq.methods import Method, Tuning
from llmq.model.passes.hidden_states import Place
from llmq.report.events import Event
from llmq.report.record import BlockReport, Report, StageGain, TuningStep
from llmq.setting_fields import merged
from llmq.steps.end_to_end import memory_plan, session, tuned_blocks
from llmq.steps.end_to_end.session import Session
from llmq.steps.end_to_end.tuned_blocks import _transformed
from tests.runs import Stopped, files_of, float_model, logits, read_text, stop, tensors_of

Checkpoints = Callable[..., Path]

SAMPLES, LENGTH, HELD_OUT, STEPS = 16, 32, 4, 4
# Two weights per block are enough, and quick.
SETTINGS: dict[str, Any] = {"samples": SAMPLES, "seqlen": LENGTH, "bits": 3, "group_size": 16, "scales": "minmax"}
SETTINGS |= {"validate": 0}
SETTINGS |= {"skip": ["*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj"]}
TUNING = Tuning(steps=STEPS, scales=3e-3, rounding=5e-2, tokens=4 * LENGTH)
UNTUNED = Method(rounding="rtn", validation=HELD_OUT / SAMPLES)
TUNED = Method(rounding="rtn", validation=HELD_OUT / SAMPLES, tuning=TUNING)


@pytest.fixture
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture
def saved_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the progress before every step."""
    monkeypatch.setattr(session, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(session, "SAVED_SHARE", 0.0)


def job(model: Path, out: Path, text: Path, method: Method = TUNED, **settings: Any) -> Job:
    config = merged(QuantConfig(), {**SETTINGS, "calibration": [text], **settings})
    return Job(str(model), out, config, stages=method, device="cpu")


def quantize(model: Path, out: Path, text: Path, method: Method = TUNED, **settings: Any) -> Report:
    return job(model, out, text, method, **settings).run()


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that memory is full, so that everything possible is kept on disk."""
    monkeypatch.setattr(memory, "spare", lambda _: 0)


def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep hidden states and packed blocks on disk; nothing else changes."""
    choose = memory_plan.choose

    def chosen(*arguments: Any) -> memory_plan.MemoryPlan:
        return dataclasses.replace(choose(*arguments), states=Place.FILE, packed_in_memory=False)

    monkeypatch.setattr(memory_plan, "choose", chosen)


def interrupt(model: Path, out: Path, text: Path, step: int) -> None:
    """Start a run and stop it before a step of the tuning."""

    def reached(event: Event) -> bool:
        return isinstance(event, TuningStep) and event.step == step

    stop(job(model, out, text).run, reached)


def held_out_divergence(model: Path, out: Path, windows: Tensor) -> float:
    expected = logits(float_model(model, {}), windows).log_softmax(-1)
    predicted = logits(llmq.load(out, device="cpu")[0], windows).log_softmax(-1)
    return float(kl_divergence(expected, predicted).mean())


def test_tuning_lowers_the_validation_loss_of_the_file(model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "tuned", text).tuning
    quantize(model, tmp_path / "plain", text, UNTUNED)
    windows = read_text(job(model, tmp_path / "none", text)).windows[-HELD_OUT:]
    before, after = (held_out_divergence(model, tmp_path / name, windows) for name in ("plain", "tuned"))
    assert report is not None
    assert after < 0.9 * before
    # The report matches the files, except that the packed model sums in another order.
    losses = dict(report.history)
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert losses[report.best] == pytest.approx(after, rel=1e-4)
    assert report.best == min(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(STEPS + 1))
    tensors = [tensors_of(tmp_path / name) for name in ("plain", "tuned")]
    assert {name: tensor.shape for name, tensor in tensors[0].items()} == {n: t.shape for n, t in tensors[1].items()}
    moved = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert {name.rsplit(".", 1)[1] for name in moved} == {"weight_packed", "weight_scale"}
    assert 0 < report.moved < 0.2
    stored = json.loads((tmp_path / "tuned" / "llmq.json").read_text())["tuning"]
    assert stored["best"] == report.best


def test_no_progress_files_remain(model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "tuned", text)
    quantize(model, tmp_path / "plain", text, UNTUNED)
    assert files_of(tmp_path / "tuned").keys() == files_of(tmp_path / "plain").keys()


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma3"])
def test_reading_blocks_from_disk_gives_the_same_bytes(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = checkpoint(name, num_hidden_layers=2)
    kept = quantize(folder, tmp_path / "memory", text, symmetric=False)
    on_disk(monkeypatch)
    read = quantize(folder, tmp_path / "disk", text, symmetric=False)
    assert kept.tuning is not None and read.tuning is not None
    assert kept.tuning.history == read.tuning.history
    assert (kept.tuning.notes, len(read.tuning.notes)) == ((), 1)
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "disk")


def test_without_memory_or_text_the_model_is_not_tuned(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_always: None, reference: Path
) -> None:
    """The report has the reason, and an interrupted run continues as it began, whatever memory is free later."""
    quantize(model, tmp_path / "plain", text, UNTUNED)
    more_text = dataclasses.replace(TUNED, tuning=dataclasses.replace(TUNING, tokens_per_weight=100.0))
    little = quantize(model, tmp_path / "text", text, more_text).tuning
    interrupt(model, tmp_path / "out", text, 2)
    no_memory(monkeypatch)
    full = quantize(model, tmp_path / "memory", text).tuning
    quantize(model, tmp_path / "out", text)
    for report, reason in ((little, "tokens per weight"), (full, "memory")):
        assert report is not None and report.steps == 0 and reason in report.notes[0] and "left out" in str(report)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "text") == files_of(tmp_path / "memory")
    assert files_of(tmp_path / "out") == files_of(reference)


def test_one_block_at_a_time_is_in_float(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = job(model, tmp_path / "out", text)
    loaded = []
    update = tuned_blocks.TunedBlocks.update

    def recorded_update(self: tuned_blocks.TunedBlocks, *arguments: Any) -> None:
        modules = [block.module for block in running.plan.skeleton.blocks]
        loaded.append([not next(module.parameters()).is_meta for module in modules])
        update(self, *arguments)

    monkeypatch.setattr(tuned_blocks.TunedBlocks, "update", recorded_update)
    running.run()
    assert loaded == [[False, True], [True, False]] * STEPS


@pytest.mark.parametrize(("step", "short"), [(0, False), (2, True), (STEPS, False)])
def test_an_interrupted_run_ends_in_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_always: None, step: int, short: bool
) -> None:
    whole = quantize(model, tmp_path / "whole", text)
    if short:
        on_disk(monkeypatch)
    interrupt(model, tmp_path / "out", text, step)
    assert not (tmp_path / "out" / "config.json").exists()
    began: list[int] = []
    monkeypatch.setattr(Session, "_descend", counting(Session._descend, began))
    again = quantize(model, tmp_path / "out", text)
    assert began == list(range(max(0, step - 1), STEPS))  # saved before the last step
    assert whole.tuning is not None and again.tuning is not None
    assert again.tuning.history == whole.tuning.history
    assert again.tuning.seconds > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def counting(descend: Callable[[Session], float], into: list[int]) -> Callable[[Session], float]:
    def counted(self: Session) -> float:
        into.append(self._step)
        return descend(self)

    return counted


# Points of interruption: within a step, while states or the best blocks are written, before and after each mark.
ENDS = [
    (tuned_blocks.TunedBlocks, "update", 5, "before", "memory"),
    (tuned_blocks.TunedBlocks, "update", 5, "after", "disk"),
    (Revision, "write_state", 10, "after", "memory"),
    (Revision, "write_state", 10, "before", "disk"),
    (Revision, "write_block", 3, "after", "memory"),
    (Revision, "drop_blocks", 1, "after", "disk"),
    (Revision, "save", 3, "before", "memory"),
    (Revision, "save", 3, "after", "disk"),
    (Revision, "adopt", 1, "before", "disk"),
    (Revision, "adopt", 1, "after", "memory"),
]


@pytest.mark.parametrize(("owner", "name", "calls", "when", "where"), ENDS, ids=lambda value: str(value))
def test_a_run_killed_at_any_point_ends_in_the_same_bytes(
    reference: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_always: None,
    owner: type, name: str, calls: int, when: str, where: str,
) -> None:  # fmt: skip
    if where == "disk":
        on_disk(monkeypatch)
    original = getattr(owner, name)
    left = [calls]

    def ending(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise Stopped
        result = original(*arguments)
        if left[0] == 0:
            raise Stopped
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ending)
        with pytest.raises(Stopped):
            quantize(model, tmp_path / "out", text)
    quantize(model, tmp_path / "out", text)
    assert files_of(tmp_path / "out") == files_of(reference)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoints, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    quantize(checkpoint("llama", num_hidden_layers=2), out, text)
    return out


def test_adopted_weights_are_not_tuned_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(save, "finish", refuse)
        quantize(model, tmp_path / "out", text)
    monkeypatch.setattr(Session, "run_steps", refuse)
    report = quantize(model, tmp_path / "out", text).tuning
    assert report is not None and report.best > 0 and len(report.history) == STEPS + 1
    assert files_of(tmp_path / "out") == files_of(reference)


def test_damaged_progress_is_discarded(
    model: Path, text: Path, tmp_path: Path, saved_always: None, reference: Path
) -> None:
    interrupt(model, tmp_path / "out", text, 3)
    damaged = next((tmp_path / "out").rglob("state.*"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    quantize(model, tmp_path / "out", text)
    assert files_of(tmp_path / "out") == files_of(reference)


def test_tuning_that_raises_the_loss_is_undone(model: Path, text: Path, tmp_path: Path) -> None:
    wild = Method(rounding="rtn", validation=0.25, tuning=Tuning(steps=4, scales=5.0, rounding=5.0, tokens=4 * LENGTH))
    report = quantize(model, tmp_path / "wild", text, wild).tuning
    quantize(model, tmp_path / "plain", text, UNTUNED)
    assert report is not None
    losses = dict(report.history)
    assert report.best == 0 and report.moved == 0 and losses[4] > losses[0]
    assert "undone" in str(report)
    assert files_of(tmp_path / "wild") == files_of(tmp_path / "plain")


def test_the_best_step_is_kept_and_not_the_last(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation losses are fixed: the third is the lowest. A run of only that many steps would end elsewhere."""
    losses = iter([9.0, 5.0, 4.0, 6.0, 4.5])
    taken: dict[int, dict[str, Tensor]] = {}
    write = tuned_blocks.TunedBlocks.write_blocks

    def keep(self: tuned_blocks.TunedBlocks, step: int) -> float:
        taken[step] = {
            name: kl_tuning.result(self._state(i, name)).dequantize()
            for i, n in enumerate(self.names)
            for name in n.values()
        }
        return write(self, step)

    monkeypatch.setattr(Session, "_validation_loss", lambda _: next(losses))
    monkeypatch.setattr(tuned_blocks.TunedBlocks, "write_blocks", keep)
    report = quantize(model, tmp_path / "out", text).tuning
    assert report is not None and report.best == 2 and list(taken) == [1, 2]
    stored = {name.removesuffix(".weight"): weight for name, weight in llmq.dequantize(tmp_path / "out")}
    assert stored.keys() == taken[2].keys()
    assert all(torch.equal(stored[name], taken[2][name]) for name in stored)
    assert any(not torch.equal(stored[name], taken[1][name]) for name in stored)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_other_formats_and_skipped_layers(model: Path, text: Path, tmp_path: Path, format: str) -> None:
    grid: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "format": format, "skip": ["*.1.mlp.*"]}
    report = quantize(model, tmp_path / "out", text, **grid)
    assert report.tuning is not None and report.tuning.best > 0
    kept, stored = tensors_of(model), tensors_of(tmp_path / "out")
    untouched = [name for name in kept if ".1.mlp." in name]
    assert untouched and all(torch.equal(kept[name], stored[name]) for name in untouched)


def test_a_transformed_model_is_tuned(model: Path, text: Path, tmp_path: Path) -> None:
    folding = Method(transforms=("awq",), rounding="clip", validation=0.25, tuning=TUNING)
    report = quantize(model, tmp_path / "out", text, folding).tuning
    assert report is not None and report.best > 0
    windows = read_text(job(model, tmp_path / "none", text)).windows[-HELD_OUT:]
    after = held_out_divergence(model, tmp_path / "out", windows)
    assert dict(report.history)[report.best] == pytest.approx(after, rel=1e-4)


def test_one_sequence_is_too_few(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least two") as raised:
        quantize(model, tmp_path / "out", text, samples=1, seqlen=128)
    assert isinstance(raised.value, LlmqError) and raised.value.hint
    assert not (tmp_path / "out").exists()


def test_every_sequence_is_drawn_once_per_pass() -> None:
    batches = [drawn(step, 4, 18, seed=3) for step in range(9)]
    flat = [window for batch in batches for window in batch]
    assert sorted(flat[:18]) == sorted(flat[18:]) == list(range(18))
    assert flat[:18] != flat[18:]
    assert batches == [drawn(step, 4, 18, seed=3) for step in range(9)]
    assert batches != [drawn(step, 4, 18, seed=4) for step in range(9)]


@pytest.mark.parametrize(
    ("validation", "kept", "changed"),
    [(0.1, (), False), (0.1, (False,), False), (0.1, (False, True), True), (0.0, (), True)],
)
def test_a_block_with_all_transformations_undone_is_unchanged(
    validation: float, kept: tuple[bool, ...], changed: bool
) -> None:
    method = Method(rounding="gptq", transforms=("rotation",), validation=validation)
    gains = tuple(StageGain("rotation", 2.0, 1.0 if improved else 3.0, improved) for improved in kept)
    tuned = StageGain("block_tuning", 2.0, 1.0, True)  # changes quantized values only, no float weight
    assert _transformed(BlockReport("model.layers.0", (), gains=(*gains, tuned)), method) == changed
    assert not _transformed(BlockReport("model.layers.0", ()), Method(rounding="gptq"))
