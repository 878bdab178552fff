"""A float .gguf file is a model that can be quantized."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.cli import app
from llmq.errors import ConfigError
from llmq.gguf import export, writer
from llmq.gguf.reader import described
from llmq.gguf.supported import language_config
from llmq.model.build import skeleton
from tests import builders

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


@TRANSLATED
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    ],
)
def test_a_file_alone_means_what_llama_cpp_computes(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """transformers has its defaults where a file has no key, or a key that it does not read."""
    sizes = {**SIZES, "vocab_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    folder = builders.save_model(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)
    file = tmp_path / "alone" / "tiny.gguf"
    writer.write(file, folder, export._others(Checkpoint.open(folder), ()))
    with described(file) as made:
        read = language_config(skeleton.load_config(made, remote_code=False).to_dict())
    assert {name: read[name] for name in changes} == changes


def test_a_quantized_file_is_refused(model: Path, tmp_path: Path) -> None:
    llmq.quantize(model, tmp_path / "packed", **{**SETTINGS, "format": "gguf"})
    [file] = (tmp_path / "packed").glob("*.gguf")
    with pytest.raises(ConfigError, match="quantized already"):
        llmq.quantize(file, tmp_path / "again", **SETTINGS)


def test_it_needs_an_output_folder(file: Path) -> None:
    with pytest.raises(ConfigError, match="needs an output folder"):
        llmq.quantize(file, **SETTINGS)
