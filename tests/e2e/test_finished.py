"""The same command after the end: it reports that the model is finished, and changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.checkpoint.lock import LOCK
from llmq.checkpoint.staging import REMOVED
from llmq.errors import CheckpointError, ConfigError
from tests import builders, runs
from tests.command_line import llmq as command

Settings = dict[str, Any]


def changes(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=2, dtype="float16")


@pytest.mark.parametrize(
    "settings",
    [{"method": "rtn"}, {"method": "gptq"}, {"method": "rtn", "format": "awq,gptq,gguf", "group_size": 32}],
    ids=["rtn", "gptq", "several formats"],
)
def test_the_same_request_finds_its_model(settings: Settings, model: Path, text: Path, tmp_path: Path) -> None:
    first = runs.quantize(model, tmp_path / "out", text, **settings)
    (tmp_path / "out" / REMOVED).mkdir()  # what a kill between the last two steps leaves
    (tmp_path / "out" / LOCK).touch()
    before = changes(tmp_path / "out")
    again = runs.job(model, tmp_path / "out", text, **settings)
    report = again.run()
    assert again.finished
    assert report.blocks == first.blocks and report.checksums == first.checksums and report.request == first.request
    assert report.bits_per_weight == first.bits_per_weight and report.stages == first.stages
    after = changes(tmp_path / "out")
    assert before.keys() - after.keys() == {str(tmp_path / "out" / name) for name in (REMOVED, LOCK)}
    assert after.items() <= before.items() | {(str(tmp_path / "out"), after.get(str(tmp_path / "out"), 0))}


def test_another_request_does_not_take_the_model_for_its_own(model: Path, text: Path, tmp_path: Path) -> None:
    runs.quantize(model, tmp_path / "out", text, method="gptq")
    with pytest.raises(ConfigError, match="is not empty"):
        runs.quantize(model, tmp_path / "out", text, method="gptq", bits=8)
    other = builders.write_text(tmp_path / "other.txt")
    other.write_text(other.read_text()[::-1])
    with pytest.raises(ConfigError, match="is not empty"):
        runs.quantize(model, tmp_path / "out", other, method="gptq")
    text_copy = tmp_path / "text.txt"
    text_copy.write_bytes(text.read_bytes())
    runs.quantize(model, tmp_path / "own", text_copy, method="gptq")
    text_copy.write_text(text.read_text()[::-1])  # the same path, but another text
    with pytest.raises(ConfigError, match="is not empty"):
        runs.quantize(model, tmp_path / "own", text_copy, method="gptq")


def test_a_finished_model_with_a_changed_file_is_reported(model: Path, text: Path, tmp_path: Path) -> None:
    runs.quantize(model, tmp_path / "out", text, method="rtn")
    weights = tmp_path / "out" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or has changed"):
        runs.quantize(model, tmp_path / "out", text, method="rtn")
    runs.quantize(model, tmp_path / "out", text, method="rtn", overwrite=True)
    assert weights.read_bytes() == whole


def test_the_record_names_no_file_outside(model: Path, text: Path, tmp_path: Path) -> None:
    runs.quantize(model, tmp_path / "out", text, method="rtn")
    record = tmp_path / "out" / "llmq.json"
    document = json.loads(record.read_text())
    document["checksums"] = {"../text.txt": "0"}
    record.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="missing or has changed"):
        runs.quantize(model, tmp_path / "out", text, method="rtn")


def test_the_same_conversion_finds_its_model(model: Path, text: Path, tmp_path: Path) -> None:
    runs.quantize(model, tmp_path / "out", text, method="rtn", group_size=32)
    for source, target, to in (("out", "gptq", "gptq"), ("out", "gguf", "gguf"), ("gguf", "back", "awq")):
        converting = ("convert", tmp_path / source, tmp_path / target, "--to", to)
        assert command(*converting).exit_code == 0
        before = changes(tmp_path / target)
        again = command(*converting)
        assert again.exit_code == 0 and "finished already" in again.stderr
        assert "tensors compared, 0 differ" in again.stdout
        assert changes(tmp_path / target) == before
    assert command("convert", tmp_path / "out", tmp_path / "gptq", "--to", "awq").exit_code == 2
