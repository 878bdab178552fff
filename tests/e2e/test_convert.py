"""Several formats from one run, and conversions: equal dequantized weights, or an error where this is impossible."""

import dataclasses
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmq
from llmq.checkpoint.staging import STAGING
from llmq.errors import ConfigError, FormatError
from llmq.export.convert import Converter
from llmq.report.events import Event, Progress
from llmq.verification import engines
from tests import builders, mixtures
from tests.command_line import llmq as command
from tests.runs import TIMED, assert_same_weights, stop, tensors_of, weights

Checkpoints = Callable[..., Path]
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
SAFETENSORS = ("compressed-tensors", "gptq", "awq", "gptq_v2", "mlx")


def convert(source: Path, out: Path, to: str, **options: Any) -> Converter:
    converter = Converter(source, out, to, **options)
    converter.run()
    return converter


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    """A Llama whose smallest weights need scales below the range of float16."""
    return checkpoint("llama", dtype="bfloat16", num_hidden_layers=2)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`packed("awq")`: a quantized model in a format, created once."""
    made: dict[str, Path] = {}

    def make(layout: str, **settings: Any) -> Path:
        key = f"{layout} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            settings = {"group_size": 32, **settings}
            llmq.quantize(str(model), made[key], method="rtn", scales="minmax", format=layout, **settings)
        return made[key]

    return make


# ---- several formats of one run


@pytest.mark.parametrize(("dtype", "symmetric"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_all_formats_of_a_run_hold_the_same_weights(
    checkpoint: Checkpoints, tmp_path: Path, dtype: str, symmetric: bool
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint("llama", dtype=dtype, num_hidden_layers=2), model)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-6  # needs scales below the range of float16
    save_file(tensors, file, metadata={"format": "pt"})
    report = llmq.quantize(str(model), out, method="rtn", group_size=32, format=list(SAFETENSORS), symmetric=symmetric)
    assert {entry.name for entry in out.iterdir()} == set(SAFETENSORS)
    for name in SAFETENSORS:
        assert_same_weights(out / name, out / "compressed-tensors")
        assert report.sizes[name] == (out / name / "model.safetensors").stat().st_size
        record = json.loads((out / name / "llmq.json").read_text())
        assert record["sizes"] == report.sizes
    assert "scales are 6.2e-05 to" in report.left["model.layers.0.mlp.up_proj"]


def test_each_format_equals_the_output_of_a_run_for_it_alone(model: Path, packed: Any, tmp_path: Path) -> None:
    """Except for the scales, which every format must hold: a run for awq alone stores them more precisely."""
    llmq.quantize(
        str(model), tmp_path / "out", method="rtn", scales="minmax", group_size=32, format="awq,compressed-tensors"
    )
    alone, together = packed("compressed-tensors"), tmp_path / "out" / "compressed-tensors"
    assert json.loads((alone / "config.json").read_text()) == json.loads((together / "config.json").read_text())
    assert all(tensors_of(together)[name].equal(tensor) for name, tensor in tensors_of(alone).items())
    awq = packed("awq")
    assert json.loads((awq / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "awq" / "config.json").read_text()
    )


def test_a_run_killed_between_its_formats_is_continued(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "method": "gptq", "group_size": 32, "samples": 4, "seqlen": 32, "calibration": [text], "format": "gptq,awq",
    }  # fmt: skip
    llmq.quantize(str(model), tmp_path / "whole", **settings)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmq.export.convert.Converter._finish", killed)
        llmq.quantize(str(model), tmp_path / "out", **settings)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [STAGING]  # no partial output
    report = llmq.quantize(str(model), tmp_path / "out", **settings)
    assert all(block.resumed for block in report.blocks)
    for name in ("gptq", "awq"):
        for file in (tmp_path / "whole" / name).iterdir():
            if file.name not in TIMED:
                assert file.read_bytes() == (tmp_path / "out" / name / file.name).read_bytes(), file.name


def test_a_grid_that_one_format_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compressed-tensors with awq cannot hold int8 g32 symmetric.*awq holds 4"):
        llmq.quantize(
            str(model), tmp_path / "out", method="rtn", bits=8, group_size=32, format="compressed-tensors,awq"
        )


def test_several_formats_from_flags_and_toml(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('format = ["awq", "gptq"]')
    assert "awq" in command("quantize", "m", "--config", tmp_path / "x.toml", "--print-config").stdout
    printed = command("quantize", "m", "--format", "awq", "--format", "gptq", "--print-config").stdout
    assert tomllib.loads(printed)["format"] == ["awq", "gptq"]
    done = command("quantize", model, tmp_path / "out", "--method", "rtn", "--format", "awq", "--format", "gptq")
    assert done.exit_code == 0
    for text in ("size as awq", "size as gptq", "compatible engines", "vLLM"):
        assert text in done.stdout
    assert "gptq: 12 weights compared, 0 differ" in done.stderr  # awq holds one grid, and down_proj has another


def test_one_format_is_replaced_by_several_and_vice_versa(model: Path, tmp_path: Path) -> None:
    """No file of the previous model remains; files that llmq did not write are kept."""
    settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 32}
    llmq.quantize(str(model), tmp_path / "out", format="awq", **settings)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        llmq.quantize(str(model), tmp_path / "out", format="awq,gptq", **settings)
    llmq.quantize(str(model), tmp_path / "out", format="awq,gptq", overwrite=True, **settings)
    top = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"awq", "gptq", "notes.txt"} <= top and not {"config.json", "model.safetensors"} & top
    llmq.quantize(str(model), tmp_path / "out", format="gptq", overwrite=True, **settings)
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "out" / "notes.txt").is_file()


def test_overwriting_removes_the_old_gguf_file(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 32}
    llmq.quantize(str(model), tmp_path / "out", format="gguf", **settings)
    (tmp_path / "out" / "own.gguf").write_bytes(b"mine")
    (tmp_path / "out").rename(tmp_path / "moved")  # only llmq.json records that llmq wrote out.gguf
    llmq.quantize(str(model), tmp_path / "moved", format="gptq", overwrite=True, **settings)
    assert {file.name for file in (tmp_path / "moved").glob("*.gguf")} == {"own.gguf"}


def test_custom_model_code_is_run_for_every_format(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.setattr("sys.path", [*sys.path])
    shutil.copytree(model, tmp_path / "own")
    (tmp_path / "own" / "modeling_own.py").write_text(OWN_CODE)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    builders.change_json(
        tmp_path / "own" / "config.json", model_type="own", auto_map=code, architectures=["OwnForCausalLM"]
    )
    settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 32, "format": "gptq,awq"}
    report = llmq.quantize(str(tmp_path / "own"), tmp_path / "out", trust_remote_code=True, **settings)
    assert [note for note in report.notes if "does not build" in note] == []
    made = json.loads((tmp_path / "out" / "awq" / "config.json").read_text())["quantization_config"]
    assert made["modules_to_not_convert"] == ["lm_head"]


# ---- convert


@pytest.mark.parametrize(
    ("source", "to", "symmetric"),
    [("compressed-tensors", "gptq", True), ("compressed-tensors", "awq", False), ("gptq", "awq", True),
     ("gptq", "gptq_v2", True), ("gptq_v2", "compressed-tensors", False), ("awq", "gptq", True),
     ("awq", "gptq", False), ("awq", "compressed-tensors", True), ("gptq", "gptq", False),
     ("compressed-tensors", "mlx", False), ("mlx", "awq", True)],
)  # fmt: skip
def test_a_conversion_keeps_every_weight(packed: Any, tmp_path: Path, source: str, to: str, symmetric: bool) -> None:
    done = convert(packed(source, symmetric=symmetric), tmp_path / "out", to)
    assert (done.report.compared, done.report.differ) == (14, 0)
    assert_same_weights(tmp_path / "out", packed(source, symmetric=symmetric))


def test_a_round_trip_gives_the_same_files(packed: Any, tmp_path: Path) -> None:
    source = packed("gptq")
    convert(source, tmp_path / "between", "compressed-tensors")
    convert(tmp_path / "between", tmp_path / "back", "gptq")
    for name in ("config.json", "quantize_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert {"README.md", "report.html", "layers.csv"} <= {file.name for file in (tmp_path / "back").iterdir()}
    ours, theirs = tensors_of(tmp_path / "back"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    steps = json.loads((tmp_path / "back" / "llmq.json").read_text())["conversions"]
    assert [(step["from"], step["to"]) for step in steps] == [
        ("gptq", "compressed-tensors"),
        ("compressed-tensors", "gptq"),
    ]


def test_three_bit_values_are_stored_in_four_bits(packed: Any, tmp_path: Path) -> None:
    assert convert(packed("compressed-tensors", bits=3), tmp_path / "out", "gptq").report.differ == 0
    assert_same_weights(tmp_path / "out", packed("compressed-tensors", bits=3))


def test_unsupported_weights_are_refused_and_nothing_is_written(packed: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(13 more weights\) cannot be converted to awq unchanged: awq holds"):
        convert(packed("gptq", bits=8), tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "mlx"])
def test_floats_of_four_bits_are_named(packed: Any, tmp_path: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="it is stored as nvfp4-pack-quantized, and only") as refused:
        convert(packed("compressed-tensors", bits="nvfp4", group_size=16), tmp_path / "out", to)
    assert "--to float" in refused.value.hint


def test_unsupported_weights_can_be_quantized_again(packed: Any, tmp_path: Path) -> None:
    done = convert(packed("gptq", bits=8), tmp_path / "out", "awq", allow_requantize=True)
    assert len(done.report.requantized) == 14 and done.report.compared == 0
    verdict = json.loads((tmp_path / "out" / "llmq.json").read_text())["verdict"]
    assert "14 weights were re-quantized for awq" in verdict["sentence"]  # that of the source is about other weights
    errors = {}
    before, after = weights(packed("gptq", bits=8)), weights(tmp_path / "out")
    for name, weight in before.items():
        errors[name.removesuffix(".weight")] = float((weight - after[name]).norm() / weight.norm())
    assert errors == pytest.approx(done.report.requantized, rel=1e-4)
    assert 0.01 < max(errors.values()) < 0.15


def test_act_order_is_refused_with_the_reason(packed: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed("gptq"), source)
    tensors = tensors_of(source)
    for name in tensors:
        if name.endswith("down_proj.g_idx"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="grouped by act-order"):
        convert(source, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    done = convert(source, tmp_path / "out", "compressed-tensors", allow_requantize=True)
    assert sorted(done.report.requantized) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert done.report.compared == 12


def test_scales_that_the_format_cannot_hold_are_refused(packed: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed("compressed-tensors"), source)
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 1e-9
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="scales are not exact in float16"):
        convert(source, tmp_path / "out", "gptq")


def test_an_interrupted_conversion_is_continued(packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.export.quantized_source.CHUNK_BYTES", 3000)
    convert(packed("awq"), tmp_path / "whole", "gptq")
    converter = Converter(packed("awq"), tmp_path / "out", "gptq")
    stop(converter.run, lambda event: isinstance(event, Progress) and event.done == 8)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [STAGING]
    events: list[Event] = []
    Converter(packed("awq"), tmp_path / "out", "gptq").run(events.append)
    assert len(events) < 28  # a finished chunk is one event
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_difference_is_detected_and_nothing_is_written(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmq.formats import gptq

    def wrong(q: Any) -> dict[str, Tensor]:
        tensors = gptq.pack(q)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(gptq, "LAYOUT", dataclasses.replace(gptq.LAYOUT, pack=wrong))
    with pytest.raises(FormatError, match="14 of 14 converted weights differ"):
        convert(packed("awq"), tmp_path / "out", "gptq")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---- the command


def test_the_command_reports_zero_differences(packed: Any, tmp_path: Path) -> None:
    done = command("convert", packed("awq"), tmp_path / "out", "--to", "gptq")
    assert done.exit_code == 0
    assert "14 tensors compared, 0 differ" in done.stdout
    assert "\x1b" not in done.stderr + done.stdout


def test_the_command_reports_the_error_of_quantizing_again(packed: Any, tmp_path: Path) -> None:
    done = command("convert", packed("gptq", bits=8), tmp_path / "out", "--to", "awq", "--allow-requantize")
    assert done.exit_code == 0
    assert re.search(r"re-quantized *│ *14 tensors", done.stdout)
    outcome = command("convert", tmp_path / "out", tmp_path / "json", "--to", "gptq", "--json")
    assert json.loads(outcome.stdout)["compared"] == 14


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        (("--to", "tflite"), "--to is 'tflite', expected one of awq, compressed-tensors", "FORMATS.md"),
        (("--to", "gguf:q4_k"), "mlx, float, onnx", "FORMATS.md"),
        (("--to", "awq"), "is not empty", "--overwrite"),
    ],
)
def test_invalid_requests_are_refused(
    packed: Any, tmp_path: Path, options: tuple[str, ...], words: str, hint: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = command("convert", packed("gptq"), tmp_path, *options)
    assert done.exit_code == 2
    assert words in done.stderr and hint in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_checkpoint_is_not_converted_in_place(packed: Any) -> None:
    source = packed("gptq")
    done = command("convert", source, source, "--to", "awq", "--overwrite")
    assert done.exit_code == 2
    assert "is the source, which is never changed" in done.stderr
    assert (source / "config.json").exists()


def test_a_float_model_is_refused(model: Path, tmp_path: Path) -> None:
    done = command("convert", model, tmp_path / "out", "--to", "awq")
    assert done.exit_code == 3
    assert "is not quantized" in done.stderr


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    assert command("convert", tmp_path / "nowhere", tmp_path / "out", "--to", "awq").exit_code in (2, 3)


def test_a_conversion_restores_the_settings_of_torch(packed: Any, tmp_path: Path) -> None:
    convert(packed("gptq"), tmp_path / "out", "awq")
    assert torch.is_grad_enabled()


# ---- mixtures of experts


def test_a_moe_model_in_several_formats_and_converted(tmp_path: Path) -> None:
    """Separate experts, under the names of the Hub; the router is declared as float."""
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.qwen3_moe(), dtype="bfloat16"))
    out = tmp_path / "out"
    llmq.quantize(str(model), out, method="rtn", scales="minmax", group_size=16, format="gptq,compressed-tensors")
    assert_same_weights(out / "gptq", out / "compressed-tensors")
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in weights(out / "gptq")
    ignored = json.loads((out / "compressed-tensors" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.gate" in ignored and "lm_head" in ignored
    assert convert(out / "gptq", tmp_path / "awq", "awq").report.differ == 0
    convert(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    back = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert back["ignore"] == ignored
    findings = engines.check(tmp_path / "back")
    rules = {finding.rule for finding in findings if finding.engine == "vLLM" and finding.outcome == "unknown"}
    assert rules == {"compressed-tensors groups", "compressed-tensors groups of experts"}  # groups of 16
