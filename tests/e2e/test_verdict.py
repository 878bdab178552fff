"""The finished model is measured on text that calibration did not read, against the original and round to nearest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.errors import BackendError
from llmq.report.record import Report
from tests.command_line import llmq
from tests.runs import float_equivalent, float_model, job, logits, quantize, read_text, windows_of

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("verdict") / "out"
    return out, quantize(model, out, text, method="gptq", validate=3)


def divergence(expected: Tensor, actual: Tensor) -> float:
    """The mean KL divergence of logits (S, T, V)."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def held_back(model: Path, text: Path) -> Tensor:
    return read_text(job(model, model / "nowhere", text, validate=3)).held_back


def test_the_figures_are_those_of_the_files(model: Path, text: Path, finished: tuple[Path, Report]) -> None:
    (out, report), windows = finished, held_back(model, text)
    verdict = report.verdict
    assert verdict is not None and windows.shape == (3, 48) and verdict.tokens == 144
    expected = logits(float_model(model, {}), windows)
    actual = logits(float_model(model, float_equivalent(out, model)), windows)
    assert verdict.kl == pytest.approx(divergence(expected, actual), rel=1e-3)
    assert verdict.same_top1 == pytest.approx(float((expected.argmax(-1) == actual.argmax(-1)).double().mean()))
    for measured, from_logits in ((verdict.perplexity, actual), (verdict.perplexity_float, expected)):
        loss = torch.nn.functional.cross_entropy(from_logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert measured == pytest.approx(float(loss.exp()), rel=1e-3)
    assert verdict.continuations and "calibration did not read" in verdict.text


def test_round_to_nearest_has_the_same_grids(
    model: Path, text: Path, finished: tuple[Path, Report], tmp_path: Path
) -> None:
    quantize(model, tmp_path / "rtn", text, method="rtn")
    windows, verdict = held_back(model, text), finished[1].verdict
    assert verdict is not None
    rounded = logits(float_model(model, float_equivalent(tmp_path / "rtn", model)), windows)
    assert verdict.kl_rtn == pytest.approx(divergence(logits(float_model(model, {}), windows), rounded), rel=1e-3)


def test_the_held_back_text_does_not_change_the_calibration_text(model: Path, text: Path) -> None:
    with_text = windows_of(model, text, validate=3)
    assert torch.equal(with_text, windows_of(model, text))
    rows = {tuple(row) for row in with_text.tolist()}
    assert not rows & {tuple(row) for row in held_back(model, text).tolist()}


def test_the_same_command_has_the_same_verdict(model: Path, text: Path, finished: tuple[Path, Report]) -> None:
    out, report = finished
    assert quantize(model, out, text, method="gptq", validate=3).verdict == report.verdict
    record = json.loads((out / "llmq.json").read_text())
    (out / "llmq.json").write_text(json.dumps({**record, "verdict": None}))  # as if killed before the measurement
    again = quantize(model, out, text, method="gptq", validate=3).verdict
    assert again is not None and report.verdict is not None and again.kl == report.verdict.kl
    assert json.loads((out / "llmq.json").read_text())["verdict"]["kl"] == again.kl


def test_without_text_the_verdict_says_how_to_get_one(model: Path, tmp_path: Path) -> None:
    arguments = [model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--device", "cpu"]
    outcome = llmq("quantize", *arguments)
    assert outcome.exit_code == 0 and "add --calibration FILE" in outcome.stdout, outcome.stderr
    assert "vllm serve" in outcome.stdout and "llmq eval" in outcome.stdout and "report.html" in outcome.stdout
    assert llmq("quantize", *arguments, "--max-kl", "1").exit_code == 2


def test_a_limit_that_is_not_met_keeps_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    outcome = llmq(
        "quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--device", "cpu",
        "--calibration", text, "--validate", "2", "--seqlen", "48", "--format", "gguf", "--max-kl", "1e-9",
    )  # fmt: skip
    assert outcome.exit_code == 8 and "finished model is kept" in outcome.stderr
    assert (tmp_path / "out" / "config.json").is_file() and "llama-cli -m" in outcome.stdout
    assert json.loads((tmp_path / "out" / "llmq.json").read_text())["verdict"]["kl"] > 1e-9


def test_without_memory_the_model_is_complete_and_the_error_says_so(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("llmq.export.verdict.run_compared", full)
    with pytest.raises(BackendError, match="out of memory while the finished model was measured"):
        quantize(model, tmp_path / "out", text, method="rtn", validate=2)
    assert (tmp_path / "out" / "config.json").is_file()
    assert quantize(model, tmp_path / "out", text, method="rtn").verdict is None  # finished, and not measured


def test_few_samples_turn_the_measurement_off(model: Path, text: Path, tmp_path: Path) -> None:
    assert quantize(model, tmp_path / "out", text, method="rtn", samples=15, validate=None).verdict is None
