"""ONNX without its packages, and requests that have no effect: an error that names the way out.

What the graphs compute is tested in tests/interop/test_onnx.py, where the packages are installed.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

import llmq
from llmq.checkpoint.index import ONNX_FILE
from llmq.export.onnx import trace
from llmq.runtime import onnx_model
from tests.command_line import Outcome
from tests.command_line import llmq as command


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    model = checkpoint("llama", dtype="bfloat16", num_hidden_layers=1)
    llmq.quantize(str(model), out, method="rtn", scales="minmax", group_size=32, validate=0, format="gguf,gptq")
    return out


def refused(outcome: Outcome, exit_code: int, *words: str) -> None:
    assert outcome.exit_code == exit_code
    text = " ".join(outcome.stderr.split())
    assert all(word in text for word in words), text


def test_missing_packages_are_named(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "PACKAGES", ("a_package_that_nobody_has",))
    done = command("convert", packed / "gptq", tmp_path / "out", "--to", "onnx")
    refused(done, 6, "needs the package a_package_that_nobody_has", "pip install 'llmq-quantize[onnx]'")
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint("llama", dtype="bfloat16", num_hidden_layers=1)
    (tmp_path / ONNX_FILE).touch()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(onnx_model, "is_installed", lambda engine: False)
    done = command("eval", tmp_path, "--against", original, "--text", text, "--engine", "openvino")
    refused(done, 6, "needs openvino, which is not installed", "pip install openvino")
    done = command("eval", tmp_path, "--against", original, "--text", text, "--activations", "int8")
    refused(done, 2, "whose graph decides how inputs are quantized")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "gptq", "--activations", "int8"), "--activations is for --to onnx, found --to gptq"),
        (("--to", "onnx", "--activations", "int4"), "activations is 'int4', expected one of none, int8"),
        (("--to", "onnx", "--allow-requantize"), "--allow-requantize has no effect on --to onnx"),
        (("--to", "onnx", "--dtype", "float16"), "--dtype is for --to float, found --to onnx"),
    ],
)
def test_options_without_effect_are_refused(
    packed: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused(command("convert", packed / "gptq", tmp_path / "out", *arguments), 2, words)


def test_a_gguf_file_is_converted_in_two_steps(packed: Path, tmp_path: Path) -> None:
    done = command("convert", packed / "gguf", tmp_path / "out", "--to", "onnx")
    refused(done, 2, "is a .gguf file", "BETWEEN --to compressed-tensors")


def test_engines_are_for_onnx_models(packed: Path, text: Path) -> None:
    done = command("eval", packed / "gptq", "--text", text, "--engine", "onnxruntime")
    refused(done, 2, "--engine onnxruntime is for ONNX models", "llmq convert --to onnx")
