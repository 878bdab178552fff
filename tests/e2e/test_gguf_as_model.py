"""A float .gguf file is a model that can be quantized."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.cli import app
from llmq.errors import ConfigError
from llmq.gguf import export, writer

pytest.importorskip("gguf")
BUNDLED = Path(__file__).resolve().parents[2] / "eval" / "models" / "tiny-python-llama"
TRANSLATED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # from transformers' reader
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SETTINGS = {"method": "rtn", "group_size": 32, "device": "cpu", "validate": 0, "progress": False}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", dtype="float16", **SIZES)


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model, with configuration and tokenizer."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    for companion in model.glob("*.json"):
        shutil.copy(companion, file.parent)
    writer.write(file, model, export._others(Checkpoint.open(model), ()))
    return file


def test_the_result_is_that_of_the_folder(model: Path, file: Path, tmp_path: Path) -> None:
    report = llmq.quantize(file, tmp_path / "from-file", **SETTINGS)
    llmq.quantize(model, tmp_path / "from-folder", **SETTINGS)
    made, expected = (dict(llmq.dequantize(tmp_path / name)) for name in ("from-file", "from-folder"))
    assert made.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(made[name], weight), name
    assert report.source == str(file)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    again = llmq.quantize(file, tmp_path / "from-file", **SETTINGS)
    assert again.request == report.request, "the same command finds the finished model"


@TRANSLATED
def test_a_file_alone_describes_its_model(tmp_path: Path) -> None:
    file = tmp_path / "bundled.gguf"
    writer.write(file, BUNDLED, export._others(Checkpoint.open(BUNDLED), ()))
    arguments = [
        "quantize",
        str(file),
        str(tmp_path / "out"),
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--validate",
        "0",
    ]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert llmq.verify(tmp_path / "out").intact


def test_a_quantized_file_is_refused(model: Path, tmp_path: Path) -> None:
    llmq.quantize(model, tmp_path / "packed", **{**SETTINGS, "format": "gguf"})
    [file] = (tmp_path / "packed").glob("*.gguf")
    with pytest.raises(ConfigError, match="quantized already"):
        llmq.quantize(file, tmp_path / "again", **SETTINGS)


def test_it_needs_an_output_folder(file: Path) -> None:
    with pytest.raises(ConfigError, match="needs an output folder"):
        llmq.quantize(file, **SETTINGS)
