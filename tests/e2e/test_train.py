"""`llmq train`: measures the start and the result, continues after an interruption, and never makes a model worse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq.config import QuantConfig
from llmq.errors import CalibrationError, ConfigError
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import Event
from llmq.report.record import TuningStep
from llmq.report.stored_record import read_record, read_report
from llmq.report.training import TrainingReport
from llmq.training.run import Training
from llmq.training.settings import TrainingSettings
from tests import builders
from tests.command_line import llmq as run
from tests.processes import results, start
from tests.runs import Stopped, tensors_of

START = QuantConfig(method="rtn", scheme=WeightScheme(2, 16))
SETTINGS: dict[str, Any] = {"steps": 8, "sequence_length": 32, "held_out": 4, "evaluate_every": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = builders.causal_model(builders.llama(num_hidden_layers=1), dtype="bfloat16")
    return builders.save_model(tmp_path_factory.mktemp("model"), made)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_text(tmp_path_factory.mktemp("text") / "text.txt", 3000)


@pytest.fixture(scope="module")
def trained(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was not interrupted."""
    out = tmp_path_factory.mktemp("trained") / "out"
    training(model, out, text).run()
    return out


def training(model: Path, out: Path, text: Path, start: QuantConfig | None = START, **changes: Any) -> Training:
    own = {name: changes.pop(name) for name in ("original", "overwrite", "tracker") if name in changes}
    settings = TrainingSettings(**{**SETTINGS, **changes})
    return Training(model, out, [str(text)], start=start, settings=settings, device="cpu", **own)


def stop_at(step: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, TuningStep) and event.step == step:
            raise Stopped

    return stop


def test_losses_fall_and_are_recorded_side_by_side(trained: Path) -> None:
    report = TrainingReport.from_dict(read_record(trained)["training"])
    assert [entry.step for entry in report.history] == [0, 4, 8]
    assert report.history[0].training is None and report.history[-1].training is not None
    assert report.history[-1].held_out < report.history[0].held_out
    assert report.kept and report.before.kl == pytest.approx(report.history[0].held_out, rel=1e-4)
    assert report.after.kl == pytest.approx(report.history[-1].held_out, rel=0.02)  # norms are rounded in the file
    assert "training text" in str(report) and report.sentence in read_report(trained).notes
    verdict = read_report(trained).verdict
    assert verdict is not None and verdict.kl == report.after.kl
    llmq.verify(trained).require_intact()


def test_equal_training_has_finished_already(trained: Path, model: Path, text: Path) -> None:
    again = training(model, trained, text)
    report = again.run()
    assert again.finished and report is not None and report.history[-1].step == 8
    with pytest.raises(ConfigError, match="not empty"):
        training(model, trained, text, steps=9).run()


def test_interrupted_training_continues_to_the_same_bytes(
    trained: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """Stopped between two validations."""
    out, steps = tmp_path / "out", list[int]()
    with pytest.raises(Stopped):
        training(model, out, text).run(stop_at(6))
    assert not (out / "config.json").exists()
    training(model, out, text).run(lambda event: steps.append(event.step) if isinstance(event, TuningStep) else None)
    assert steps == [4, 5, 6, 7, 8]
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_damaged_checkpoint_is_not_used(trained: Path, model: Path, text: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", list[int]()
    with pytest.raises(Stopped):
        training(model, out, text).run(stop_at(6))
    [optimizer] = (out / ".llmq-partial").rglob("optimizer.bin")
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"!")
    record = lambda event: steps.append(event.step) if isinstance(event, TuningStep) else None  # noqa: E731
    report = training(model, out, text).run(record)
    assert steps[0] == 0 and report is not None and "damaged" in report.notes[-1]
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_start_is_kept_if_the_training_made_it_worse(model: Path, text: Path, tmp_path: Path) -> None:
    begun = tmp_path / "start"
    llmq.quantize(model, begun, method="rtn", bits=8, group_size=16, validate=0)
    report = training(begun, tmp_path / "out", text, None, original=model, learning_rate=0.5).run()
    assert report is not None and not report.kept and "undone" in report.sentence
    assert report.before.kl is not None and report.after.kl is not None and report.before.kl < report.after.kl
    written = tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors_of(begun).items())
    assert report.sentence in read_report(tmp_path / "out").notes
    llmq.verify(tmp_path / "out").require_intact()


def test_cross_entropy_needs_no_original(trained: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "train", trained, out, "--data", text, "--loss", "cross-entropy", "--steps", "4", "--sequence-length", "32",
        "--held-out", "2", "--accumulate", "2", "--activation-checkpointing", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = TrainingReport.from_dict(json.loads(done.stdout))
    assert report.kept and report.after.kl is None and report.after.perplexity < report.before.perplexity


def test_two_processes_compute_what_one_does(trained: Path, model: Path, text: Path, tmp_path: Path) -> None:
    first, second = results(start(2, _trained, trained, model, text, tmp_path / "out"))
    alone = training(trained, tmp_path / "alone", text, None, original=model, steps=2).run()
    assert first is not None and second is None and alone is not None
    together = TrainingReport.from_dict(first)
    for one, other in zip(together.history, alone.history, strict=True):
        assert one.held_out == pytest.approx(other.held_out, rel=1e-5)
        assert one.training == (other.training and pytest.approx(other.training, rel=1e-5))


def _trained(start: Path, model: Path, text: Path, out: Path) -> dict[str, Any] | None:
    report = training(start, out, text, None, original=model, steps=2).run()
    return None if report is None else report.to_dict()


def test_context_of_a_language_model_within_another_limits_sequences(model: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"max_position_embeddings": 16}}))
    assert training(folder, tmp_path / "out", text)._text.windows.shape[1] == 16


def test_wrong_uses_are_refused(trained: Path, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for match, create in (
        ("needs the original", lambda: training(trained, out, text, None)),
        ("quantized already", lambda: training(trained, out, text, original=model)),
        ("is the original", lambda: training(model, out, text, original=model)),
        ("never changed", lambda: training(model, model, text)),
        ("safetensors format", lambda: training(model, out, text, START.replace(format="gguf"))),
        ("multiple of 3", lambda: training(model, out, text, accumulate=3).run()),
        ("expected one of kl", lambda: training(model, out, text, loss="mse")),
        ("unknown tracker", lambda: training(model, out, text, tracker="paper")),
        ("less than 1", lambda: training(model, out, text, learning_rate=2.0)),
    ):
        with pytest.raises(ConfigError, match=match):
            create()
    with pytest.raises(CalibrationError, match="expected at least 201"):
        training(model, out, text, held_out=200)
    with pytest.raises(CalibrationError, match="not a text to train on"):
        training(model, out, Path("self"))
    assert not out.exists()
