"""GGUF next to other formats, converted from them and to them: equal dequantized weights, or an error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmq
from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError, ConfigError, FormatError, UnsupportedModelError
from llmq.evaluation.measure import measure
from llmq.export.from_gguf import GgufConverter
from llmq.report.events import Event, Progress
from llmq.verification.inspection import inspect
from tests.command_line import llmq as command
from tests.runs import assert_same_weights, stop, tensors_of, weights

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

LINEARS = 14


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    """A Llama; a .gguf file stores the rows of its q and k in another order."""
    return checkpoint("llama", dtype="bfloat16", num_hidden_layers=2)


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """OUT/compressed-tensors and OUT/gguf of one run."""
    made: dict[bool, Path] = {}

    def make(symmetric: bool) -> Path:
        if symmetric not in made:
            made[symmetric] = tmp_path_factory.mktemp("both") / "out"
            llmq.quantize(
                str(model), made[symmetric], method="rtn", scales="minmax", group_size=32, symmetric=symmetric,
                format="compressed-tensors,gguf",
            )  # fmt: skip
        return made[symmetric]

    return make


def block_types(file: Path) -> set[str]:
    """Block types of the linear layers in the blocks."""
    tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name.startswith("blk.")]
    return {tensor.tensor_type.name for tensor in tensors} - {"F32"}


@pytest.mark.parametrize(("symmetric", "kind"), [(True, "Q4_0"), (False, "Q5_0")])
def test_gguf_and_another_format_hold_the_same_weights(both: Any, symmetric: bool, kind: str) -> None:
    out = both(symmetric)
    assert {entry.name for entry in out.iterdir()} == {"compressed-tensors", "gguf"}
    file = out / "gguf" / "out.gguf"
    assert block_types(file) == {kind}
    assert "quantization_config" not in json.loads((out / "gguf" / "config.json").read_text())
    assert (out / "gguf" / "tokenizer.json").is_file()
    assert json.loads((out / "gguf" / "llmq.json").read_text())["sizes"]["gguf"] == file.stat().st_size
    from_gguf, expected = weights(file), weights(out / "compressed-tensors")
    down = from_gguf["blk.1.ffn_down.weight"], expected["model.layers.1.mlp.down_proj.weight"]
    assert down[0].equal(down[1])


def test_gguf_as_the_only_format_is_written_into_the_folder(model: Path, both: Any, tmp_path: Path) -> None:
    llmq.quantize(str(model), tmp_path / "out", method="rtn", scales="minmax", group_size=32, format="gguf")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert "out.gguf" in names and not any(name.endswith(".safetensors") for name in names)
    assert STAGING not in names
    done = command("verify", tmp_path / "out", "--for", "llama.cpp")
    assert done.exit_code == 0 and "checksums" in done.stdout


def test_a_gguf_grid(model: Path, tmp_path: Path) -> None:
    report = llmq.quantize(str(model), tmp_path / "out", method="rtn", format="gguf:q4_k")
    assert report.file_bytes == (tmp_path / "out" / "out.gguf").stat().st_size
    assert any("q5_0 instead of q4_k" in plan for plan in map(str, report.layers)) or report.layers
    assert command("verify", tmp_path / "out", "--for", "llama.cpp").exit_code == 0


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gguf_file_converts_to_any_other_format(both: Any, tmp_path: Path, to: str, symmetric: bool) -> None:
    """Zero points are restored, although Q5_0 has none."""
    done = command("convert", both(symmetric) / "gguf" / "out.gguf", tmp_path / "out", "--to", to)
    assert done.exit_code == 0
    assert f"{LINEARS} tensors compared, 0 differ" in done.stdout
    assert_same_weights(tmp_path / "out", both(symmetric) / "compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if to == "gptq":
        assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 32, symmetric)
    rest, expected = tensors_of(tmp_path / "out"), tensors_of(both(symmetric) / "compressed-tensors")
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        assert rest[name].float().equal(expected[name].float()), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_other_formats_convert_to_gguf(both: Any, tmp_path: Path, symmetric: bool) -> None:
    done = command("convert", both(symmetric) / "compressed-tensors", tmp_path / "out", "--to", "gguf")
    assert done.exit_code == 0
    assert f"{LINEARS} tensors compared, 0 differ" in done.stdout
    ours, theirs = (gguf.GGUFReader(path).tensors for path in (
        tmp_path / "out" / "out.gguf", both(symmetric) / "gguf" / "out.gguf"))  # fmt: skip
    assert [tensor.name for tensor in ours] == [tensor.name for tensor in theirs]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, theirs, strict=True))


def test_unsupported_group_sizes_are_refused_or_requantized(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    llmq.quantize(str(model), source, method="rtn", scales="minmax", group_size=16, format="gptq")
    done = command("convert", source, tmp_path / "out", "--to", "gguf")
    assert done.exit_code == 2
    assert "the groups have 16" in done.stderr and "--allow-requantize" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command("convert", source, tmp_path / "out", "--to", "gguf", "--allow-requantize", "--json")
    result = json.loads(done.stdout)
    assert len(result["requantized"]) == LINEARS and 0 < max(result["requantized"].values()) < 0.2


def test_blocks_with_offsets_are_refused_or_requantized(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.export.from_gguf.EXACT", ("Q8_0",))  # treat Q4_0 like blocks with offsets
    llmq.quantize(str(model), tmp_path / "file", method="rtn", scales="minmax", group_size=32, format="gguf")
    file = tmp_path / "file" / "file.gguf"
    done = command("convert", file, tmp_path / "out", "--to", "awq")
    assert done.exit_code == 2
    assert "other blocks are not integer grids" in done.stderr
    done = command("convert", file, tmp_path / "out", "--to", "awq", "--allow-requantize", "--json")
    assert len(json.loads(done.stdout)["requantized"]) == LINEARS


@pytest.mark.parametrize("grid", ["gguf:q4_k_m", "gguf:iq4_xs"])
def test_any_block_type_converts_to_floats(checkpoint: Callable[..., Path], tmp_path: Path, grid: str) -> None:
    wide = checkpoint("llama", dtype="bfloat16", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    llmq.quantize(str(wide), tmp_path / "file", method="rtn", format=grid)
    file = tmp_path / "file" / "file.gguf"
    done = command("convert", file, tmp_path / "out", "--to", "float")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert command("verify", tmp_path / "out").exit_code == 0
    one, two = (tensors_of(path) for path in (wide, tmp_path / "out"))
    assert one.keys() == two.keys()
    stored = {name.replace("blk.0.", ""): weight for name, weight in weights(file).items()}
    assert two["model.layers.0.mlp.down_proj.weight"].equal(stored["ffn_down.weight"])
    q = two["model.layers.0.self_attn.q_proj.weight"]
    assert not q.equal(stored["attn_q.weight"])  # the file has another order of rows
    assert (q - one["model.layers.0.self_attn.q_proj.weight"]).norm() < 0.1 * q.norm()
    assert command("convert", file, tmp_path / "out", "--to", "float").exit_code == 0  # finished already
    done = command("convert", file, tmp_path / "half", "--to", "float", "--dtype", "float16")
    assert "weights were rounded to float16" in done.stderr
    done = command("convert", file, file.parent, "--to", "float")
    assert done.exit_code == 2 and "is a source of the conversion" in done.stderr


def test_a_file_without_its_checkpoint_needs_a_source(model: Path, both: Any, tmp_path: Path) -> None:
    (tmp_path / "lone").mkdir()
    file = shutil.copy(both(True) / "gguf" / "out.gguf", tmp_path / "lone" / "x.gguf")
    done = command("convert", file, tmp_path / "out", "--to", "awq")
    assert done.exit_code == 4
    assert "--source" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["lone"]
    assert command("convert", file, tmp_path / "out", "--to", "awq", "--source", model).exit_code == 0
    assert_same_weights(tmp_path / "out", both(True) / "compressed-tensors")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer*", "*.json"])
def test_the_metadata_of_a_file_is_not_enough_for_a_conversion(both: Any, tmp_path: Path, missing: str) -> None:
    """transformers can often read the metadata, but without the class and the dtype, and with an extra token."""
    shutil.copytree(both(True) / "gguf", tmp_path / "lone")
    for file in (tmp_path / "lone").glob(missing):
        file.unlink()
    with pytest.raises(UnsupportedModelError, match=r"config\.json and tokenizer are not next to") as refused:
        GgufConverter(tmp_path / "lone" / "out.gguf", tmp_path / "out", "awq")
    assert "--source" in refused.value.hint


def test_a_folder_with_one_gguf_file_stands_for_the_file(both: Any, model: Path, text: Path, tmp_path: Path) -> None:
    folder = both(True) / "gguf"
    assert_same_weights(folder, folder / "out.gguf")
    of_folder, of_file = (measure(path, model, text, seqlen=16, limit=1) for path in (folder, folder / "out.gguf"))
    assert of_folder.model == of_file.model and of_folder.size == of_file.size
    assert command("verify", folder, "--for", "llama.cpp").exit_code == 0
    assert command("convert", folder, tmp_path / "out", "--to", "gptq").exit_code == 0
    assert_same_weights(tmp_path / "out", both(True) / "compressed-tensors")
    inspected = inspect(folder)
    assert (inspected.format, inspected.bits_per_weight) == ("gguf", 4.5)
    assert sum(layer.scheme == "Q4_0" for layer in inspected.layers) == LINEARS


@pytest.mark.parametrize("name", ["", "out.gguf"])
def test_loading_a_file_names_the_programs_that_run_it(both: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"out\.gguf is a \.gguf file, which llmq does not run") as refused:
        llmq.load(both(True) / "gguf" / name)
    assert all(word in refused.value.hint for word in ("llama.cpp", "llmq eval", "llmq convert"))


def test_a_conversion_never_overwrites_its_source(both: Any, model: Path) -> None:
    folder = both(True) / "gguf"
    with pytest.raises(ConfigError, match="is the original model, which is never changed"):
        GgufConverter(folder / "out.gguf", model, "awq", like=model, overwrite=True)
    with pytest.raises(ConfigError, match=r"is the folder of out\.gguf"):
        GgufConverter(folder / "out.gguf", folder, "awq", overwrite=True)


def test_an_output_must_be_a_folder(both: Any, model: Path, tmp_path: Path) -> None:
    for arguments in (
        ("convert", both(True) / "compressed-tensors", tmp_path / "x.gguf", "--to", "gguf"),
        ("convert", both(True) / "gguf" / "out.gguf", tmp_path / "x.gguf", "--to", "awq"),
        ("quantize", model, tmp_path / "x.gguf", "--method", "rtn", "--group-size", "32", "--format", "gguf"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2 and "expected the name of a folder" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("--to", "gguf"), 2, "is a .gguf file already"),
        (("--to", "onnx"), 2, "expected a folder with safetensors files"),
        (("--to", "awq", "--source", "no-such/folder/here"), 3, "no-such/folder/here"),
    ],
)
def test_invalid_requests_are_refused(
    both: Any, tmp_path: Path, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    done = command("convert", both(True) / "gguf" / "out.gguf", tmp_path / "out", *arguments)
    assert done.exit_code == exit_code
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(both: Any, tmp_path: Path) -> None:
    shutil.copytree(both(True) / "compressed-tensors", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    done = command("convert", tmp_path / "bare", tmp_path / "out", "--to", "gguf")
    assert done.exit_code == 3
    assert "has no tokenizer" in done.stderr and "from the original model" in done.stderr
    assert "converted" not in done.stderr and not (tmp_path / "out").exists()


def test_a_source_is_only_for_gguf_files(both: Any, model: Path, tmp_path: Path) -> None:
    done = command("convert", both(True) / "compressed-tensors", tmp_path / "out", "--to", "awq", "--source", model)
    assert done.exit_code == 2 and "--source is for .gguf files" in done.stderr


def test_an_invalid_gguf_file_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    done = command("convert", tmp_path / "x.gguf", tmp_path / "out", "--to", "awq", "--source", model)
    assert done.exit_code == 3
    assert "is not a complete GGUF file" in done.stderr


def is_compared(event: Event) -> bool:
    return isinstance(event, Progress) and event.stage == "compared"


def test_an_early_interruption_leaves_no_files(both: Any, tmp_path: Path) -> None:
    stop(GgufConverter(both(True) / "gguf" / "out.gguf", tmp_path / "out", "awq").run, lambda _: True)
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()


def test_an_interrupted_conversion_reuses_finished_weights(both: Any, tmp_path: Path) -> None:
    file, out = both(True) / "gguf" / "out.gguf", tmp_path / "out"
    stop(GgufConverter(file, out, "awq").run, is_compared)
    assert [entry.name for entry in out.iterdir()] == [STAGING]
    events: list[Event] = []
    GgufConverter(file, out, "awq").run(events.append)
    converted = [event for event in events if isinstance(event, Progress) and event.stage == "converted"]
    assert len(converted) == 1  # one event for the finished chunk, not one per weight
    assert_same_weights(out, both(True) / "compressed-tensors")


def test_finished_weights_of_another_file_are_not_reused(both: Any, tmp_path: Path) -> None:
    shutil.copytree(both(True) / "gguf", tmp_path / "file")
    stop(GgufConverter(tmp_path / "file" / "out.gguf", tmp_path / "out", "awq").run, is_compared)
    os.utime(tmp_path / "file" / "out.gguf", (1, 1))
    with pytest.raises(ConfigError, match="finished blocks of a run with other settings"):
        GgufConverter(tmp_path / "file" / "out.gguf", tmp_path / "out", "awq").run()


def test_a_model_unknown_to_llama_cpp_is_refused_before_the_run(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint("falcon", num_hidden_layers=2)
    done = command(
        "quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--format", "gptq,gguf"
    )
    assert done.exit_code == 4
    assert "no GGUF file can be written for a model of type 'falcon'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_formats_are_written_when_one_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FormatError("no room for it")

    monkeypatch.setattr("llmq.export.save.export_gguf", fail)
    again = "quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--format", "gguf,awq,gptq"
    done = command(*again)
    assert done.exit_code == 3
    assert "no room for it" in done.stderr and "awq, gptq were written to" in done.stderr
    assert f"llmq convert {tmp_path / 'out/awq'} {tmp_path / 'out/gguf'} --to gguf" in done.stderr
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"awq", "gptq"}
    assert_same_weights(tmp_path / "out" / "awq", tmp_path / "out" / "gptq")
    assert "gguf was not written: no room for it" in str(
        json.loads((tmp_path / "out/gptq/llmq.json").read_text())["notes"]
    )
    monkeypatch.undo()
    done = command(*again)
    assert done.exit_code == 2 and "of this command, but gguf could not be written" in done.stderr
    assert f"llmq convert {tmp_path / 'out/awq'} {tmp_path / 'out/gguf'} --to gguf" in done.stderr
    assert command("convert", tmp_path / "out/awq", tmp_path / "out/gguf", "--to", "gguf").exit_code == 0
    assert "finished already" in command(*again).stdout + command(*again).stderr
