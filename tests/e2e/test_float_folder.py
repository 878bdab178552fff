"""`llmq convert --to float`: a plain folder with the values of the quantized weights, or an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.staging import STAGING
from llmq.errors import ConfigError, FormatError, UnsupportedModelError
from llmq.export.float_folder import FloatConverter
from llmq.report.events import Progress
from tests import builders, mixtures
from tests.command_line import llmq as command
from tests.runs import stop, tensors_of

TOKENS = torch.arange(3, 35)[None]


def quantized(model: Path, out: Path, **settings: Any) -> Path:
    llmq.quantize(str(model), out, **{"method": "rtn", "scales": "minmax", "group_size": 16, "validate": 0, **settings})
    return out


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = checkpoint("llama", dtype="bfloat16", num_hidden_layers=1)
    return quantized(model, tmp_path_factory.mktemp("packed") / "out")


def test_transformers_loads_the_folder_and_computes_the_same(packed: Path, tmp_path: Path) -> None:
    done = command("convert", packed, tmp_path / "out", "--to", "float")
    assert done.exit_code == 0
    assert "7 tensors compared, 0 differ" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert {file.name for file in packed.glob("token*")} == {file.name for file in (tmp_path / "out").glob("token*")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, _ = llmq.load(packed, device="cpu")
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, ours(TOKENS).logits, atol=1e-5)
    written = tensors_of(tmp_path / "out")
    assert all(torch.equal(written[name], weight) for name, weight in llmq.dequantize(packed))
    assert written["model.norm.weight"].dtype == torch.bfloat16  # copied
    verified = llmq.verify(tmp_path / "out")
    assert verified.intact and verified.integrity is not None and verified.integrity.packed == 0


def test_experts_get_the_names_that_transformers_reads(tmp_path: Path) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.qwen3_moe()))
    packed = quantized(model, tmp_path / "packed")
    llmq.convert(packed, tmp_path / "out", to="float")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours, _ = llmq.load(packed, device="cpu")
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, ours(TOKENS).logits, atol=1e-4)


def test_experts_that_transformers_would_not_load_are_an_error(tmp_path: Path) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.granitemoe()))
    packed = quantized(model, tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match="experts.0.* from a float folder .*stacked tensors"):
        llmq.convert(packed, tmp_path / "out", to="float")
    assert not (tmp_path / "out").exists()


def test_a_narrower_dtype_reports_its_rounding(packed: Path, tmp_path: Path) -> None:
    report = llmq.convert(packed, tmp_path / "out", to="float", dtype="bfloat16")
    assert (report.compared, report.differ) == (7, 7)
    assert any("7 of 7 weights were rounded to bfloat16, relative error at most 0." in note for note in report.notes)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    again = llmq.convert(packed, tmp_path / "out", to="float", dtype="bfloat16")
    assert again.finished and again.differ == 7
    with pytest.raises(ConfigError, match="is not empty"):
        llmq.convert(packed, tmp_path / "out", to="float")  # another dtype is another model


def test_weights_beyond_the_range_of_the_dtype_are_an_error(tmp_path: Path) -> None:
    model = builders.causal_model(builders.llama(num_hidden_layers=1))
    model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    packed = quantized(builders.save_model(tmp_path / "model", model), tmp_path / "packed")
    with pytest.raises(FormatError, match="down_proj has weights up to .*, which float16 cannot hold"):
        llmq.convert(packed, tmp_path / "out", to="float", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_continues(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llmq.convert(packed, tmp_path / "whole", to="float")
    monkeypatch.setattr("llmq.export.quantized_source.CHUNK_BYTES", 1)  # every weight is one part
    converter = FloatConverter(packed, tmp_path / "out")
    stop(converter.run, lambda event: isinstance(event, Progress) and event.done == 4)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [STAGING]
    llmq.convert(packed, tmp_path / "out", to="float")
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "awq", "--dtype", "float16"), "--dtype is for --to float, found --to awq"),
        (("--to", "float", "--dtype", "int8"), "dtype is 'int8', expected one of float32, bfloat16, float16"),
        (("--to", "float", "--allow-requantize"), "--allow-requantize has no effect on --to float"),
    ],
)
def test_options_without_effect_are_refused(packed: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = command("convert", packed, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
