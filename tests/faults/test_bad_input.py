"""Bad input of every kind: the right exit code, what was found, what to try, no traceback, and nothing left behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmq.checkpoint.staging import STAGING
from tests import builders
from tests.command_line import ROOT, Outcome, environment, llmq, llmq_process

CONFIG, CHECKPOINT, UNSUPPORTED, CALIBRATION, BACKEND, STORAGE = range(2, 8)  # exit codes, see llmq/errors.py
WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"

Llama = Callable[..., Path]


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A good model of one block, for the test to spoil."""
    folder: Path = shutil.copytree(checkpoint("llama", num_hidden_layers=1), tmp_path / "model")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return builders.write_text(tmp_path / "text.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def quantize(model: str | Path, out: Path, *options: str | Path, calibration: str | Path | None = None) -> Outcome:
    """Small windows and groups; without calibration text by rounding to nearest, which needs none."""
    source = ("--method", "rtn") if calibration is None else ("--calibration", calibration)
    return llmq("quantize", model, out, *source, "--samples", "4", "--seqlen", "32", "--group-size", "32", *options)


def refused(outcome: Outcome, exit_code: int, found: str, hint: str = "") -> None:
    """The exit code, and a message with the finding and the way out on stderr alone."""
    assert outcome.exit_code == exit_code, outcome.stderr
    assert outcome.stdout == ""
    message, _, way_out = outcome.stderr.partition("\ntry:")
    assert "error: " in message
    assert found in message
    assert hint in way_out
    assert "Traceback" not in outcome.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def change_weights(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def shard_by_index(model: Path, named: str) -> None:
    """The same weights as a shard, and an index that says `named` for every tensor."""
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    names = load_file(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))


# ---- the model


def test_a_path_that_is_not_there(tmp_path: Path, out: Path) -> None:
    refused(
        quantize(tmp_path / "nowhere", out), CHECKPOINT, "nowhere' is neither a path", "a folder with a config.json"
    )
    assert not out.exists()


def test_a_hub_id_without_a_hub(out: Path) -> None:
    refused(quantize("nobody/nothing", out), CHECKPOINT, "nobody/nothing is no folder here", "check the path")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect"])
def test_a_folder_without_config(command: str, model: Path, out: Path) -> None:
    (model / "config.json").unlink()
    more = {"quantize": (out,), "generate": ("--prompt", "x")}.get(command, ())
    refused(llmq(command, model, *more), CHECKPOINT, "model has no config.json", "that holds the model's config.json")
    assert not out.exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_none(content: str, model: Path, out: Path) -> None:
    (model / "config.json").write_text(content)
    refused(quantize(model, out), CHECKPOINT, "config.json", "download or copy the file again")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect"])
def test_a_truncated_shard(command: str, model: Path, out: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-1000])
    more = {"quantize": (out,), "generate": ("--prompt", "x")}.get(command, ())
    found = f"{WEIGHTS} is cut short: found {len(data) - 1000} bytes, expected {len(data)}"
    refused(llmq(command, model, *more), CHECKPOINT, found, "copy the file again")
    assert not out.exists()


def test_a_corrupted_header(model: Path, out: Path) -> None:
    data = bytearray((model / WEIGHTS).read_bytes())
    data[20:30] = b"\xff" * 10
    (model / WEIGHTS).write_bytes(data)
    refused(quantize(model, out), CHECKPOINT, "the header is not understood", "copy the file again")
    assert not out.exists()


def test_an_index_that_names_a_missing_file(model: Path, out: Path) -> None:
    shard_by_index(model, "model-00002-of-00002.safetensors")
    found = "names model-00002-of-00002.safetensors, which is not in the folder"
    refused(quantize(model, out), CHECKPOINT, found, "the missing file")
    assert not out.exists()


def test_an_index_that_leaves_the_folder(model: Path, checkpoint: Llama, out: Path) -> None:
    outside = checkpoint("llama") / WEIGHTS
    assert outside.exists()
    shard_by_index(model, f"../{outside.relative_to(model.parents[1])}")
    refused(quantize(model, out), CHECKPOINT, "expected a safetensors file inside of the folder", "do not trust")
    assert not out.exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number(name: str, value: str, model: Path, out: Path) -> None:
    change_weights(model, name, float(value))
    found = f"{name} has 1 values that are NaN or infinite, expected finite ones"
    refused(quantize(model, out), CHECKPOINT, found, "the checkpoint is damaged")
    assert not out.exists()


def test_nan_in_a_later_block_leaves_no_model(checkpoint: Llama, tmp_path: Path, out: Path) -> None:
    model = shutil.copytree(checkpoint("llama", num_hidden_layers=2), tmp_path / "two")
    change_weights(model, DOWN.replace("0", "1"), float("nan"))
    refused(quantize(model, out), CHECKPOINT, "model.layers.1.mlp.down_proj.weight has 1 values", "is damaged")
    assert [entry.name for entry in out.iterdir()] == [STAGING]


def test_weights_and_config_of_different_models(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", intermediate_size=96)
    refused(quantize(model, out), CHECKPOINT, "has the shape (64, 32), the configuration asks for (96, 32)", "config")
    assert not out.exists()


def test_a_config_with_more_layers_than_weights(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", num_hidden_layers=2)
    found = "needs the tensor model.layers.1.self_attn.q_proj.weight, which the checkpoint does not hold"
    refused(quantize(model, out), CHECKPOINT, found, "is the checkpoint complete")
    assert not out.exists()


def test_a_pickle_is_not_opened(model: Path, out: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    refused(quantize(model, out), CHECKPOINT, "pickled weights only (pytorch_model.bin)", "safetensors")
    assert not out.exists()


def test_a_model_that_is_quantized_already(model: Path, tmp_path: Path, out: Path) -> None:
    assert quantize(model, tmp_path / "first").exit_code == 0
    refused(quantize(tmp_path / "first", out), UNSUPPORTED, "is already quantized (compressed-tensors)", "unquantized")
    assert not out.exists()


SMALL = {"vocab_size": builders.VOCABULARY, "num_heads": 4, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_an_encoder(command: str, tmp_path: Path, out: Path) -> None:
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, **SMALL)
    builders.save_model(tmp_path / "bert", transformers.BertForMaskedLM(config))
    more = {"quantize": (out,), "generate": ("--prompt", "x")}[command]
    found = "holds BertForMaskedLM, which is no causal language model"
    refused(llmq(command, tmp_path / "bert", *more), UNSUPPORTED, found, "decoders that generate text")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_an_encoder_and_decoder(command: str, tmp_path: Path, out: Path) -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, **SMALL)
    builders.save_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
    more = {"quantize": (out,), "generate": ("--prompt", "x")}[command]
    found = "holds T5ForConditionalGeneration, which is no causal language model"
    refused(llmq(command, tmp_path / "t5", *more), UNSUPPORTED, found, "encoder-decoders it does not")
    assert not out.exists()


def test_code_of_the_model_is_not_run_unasked(model: Path, out: Path, tmp_path: Path) -> None:
    """The answer to transformers' own question ("run it? [y/N]") is not waited for either."""
    ran = tmp_path / "ran"
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    builders.change_json(
        model / "config.json", model_type="mystery", auto_map=code, architectures=["MysteryForCausalLM"]
    )
    (model / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    refused(quantize(model, out), UNSUPPORTED, "contains custom code", "--trust-remote-code")
    assert not ran.exists()
    assert not out.exists()


def test_an_architecture_that_nobody_knows(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", model_type="mystery")
    refused(quantize(model, out), UNSUPPORTED, "mystery", "a newer transformers may know it")
    assert not out.exists()


# ---- the settings


def test_a_group_size_that_is_no_legal_one(model: Path, out: Path) -> None:
    legal = "16, 32, 64, 128, 256, 512, 1024, channel (one scale a row) or tensor (one scale in all)"
    refused(quantize(model, out, "--group-size", "100"), CONFIG, "group size is 100", legal)
    assert not out.exists()


def test_a_group_size_that_is_no_number(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--group-size", "many"), CONFIG, "'many', expected a number, channel or tensor")


def test_a_group_size_that_does_not_divide_under_strict(model: Path, out: Path) -> None:
    found = "a group size of 128 does not divide 32 input features"
    refused(quantize(model, out, "--group-size", "128", "--strict"), CONFIG, found, "leave --strict out")
    assert not out.exists()


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4])
def test_bits_that_do_not_exist(bits: int, model: Path, out: Path) -> None:
    refused(quantize(model, out, "--bits", str(bits)), CONFIG, f"bits is {bits}, expected one of 2, 3, 4, 8", "4 is")
    assert not out.exists()


@pytest.mark.parametrize(("layout", "bits"), [("gptq", 3), ("gptq", 2), ("awq", 8), ("awq", 3)])
def test_a_grid_that_the_format_cannot_hold(layout: str, bits: int, model: Path, out: Path) -> None:
    outcome = quantize(model, out, "--format", layout, "--bits", str(bits))
    refused(outcome, CONFIG, f"{layout} cannot hold int{bits} g32 symmetric")
    assert "compressed-tensors holds 2, 3, 4 and 8" in outcome.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [("--method", "rtn, gptq, awq"), ("--format", "compressed-tensors, gptq, awq"),
     ("--order", "activation, natural"), ("--scales", "searched, minmax")],
)  # fmt: skip
def test_a_name_that_does_not_exist(option: str, expected: str, model: Path, out: Path) -> None:
    refused(quantize(model, out, option, "magic"), CONFIG, f"{option[2:]} is 'magic', expected one of {expected}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "found", "hint"),
    [
        ("metod = 'gptq'", "unknown setting: 'metod'", "known are calibration, damping, format, method"),
        ("[scheme]\nbit = 4", "unknown key of [scheme]: 'bit'", "known are bits, group_size, symmetric"),
        ("[calibration]\nfile = 'x'", "unknown key of [calibration]: 'file'", "known are samples, seqlen, sources"),
        ("[[overrides]]\npattern = 'x'\nbitz = 4", "unknown key of an override: 'bitz'", "known are bits, group_size"),
        ("scheme = 3", "scheme is 3, expected a block of keys", ""),
        ("overrides = [3]", "overrides is [3], expected a list of blocks", ""),
        ("[[overrides]]\nbits = 4", "an override has no pattern", ""),
        ("[[overrides]]\npattern = 3", "pattern is 3, expected a text", ""),
        ("skip = 'down_proj'", "skip is 'down_proj', expected a list of texts", ""),
        ("seed = 'x'", "seed is 'x', expected a whole number", ""),
        ("strict = 'maybe'", "strict is 'maybe', expected true or false", ""),
        ("method = ['rtn']", "method is ['rtn'], expected a text", ""),
        ("[scheme]\nbits = '4'", "bits is '4', expected a whole number", ""),
        ("[scheme]\ngroup_size = [1]", "group_size is [1], expected a number, channel or tensor", ""),
        ("[calibration]\nsources = 'text.txt'", "sources is 'text.txt', expected a list of texts", ""),
        ("damping = 2", "damping is 2, expected a fraction", ""),
        ("no TOML", "cannot read the configuration", ""),
    ],
)
def test_a_settings_file_that_is_wrong(settings: str, found: str, hint: str, model: Path, out: Path) -> None:
    file = model.parent / "quant.toml"
    file.write_text(settings)
    refused(llmq("quantize", model, out, "--config", file), CONFIG, found, hint)
    assert not out.exists()


def test_a_settings_file_that_is_not_there(model: Path, out: Path) -> None:
    refused(llmq("quantize", model, out, "--config", model / "no.toml"), CONFIG, "no.toml")


@pytest.mark.parametrize("option", [("--override", "re:(:bits=4"), ("--skip", "re:(")], ids=lambda option: option[0])
def test_a_pattern_that_is_none(option: tuple[str, str], model: Path, out: Path) -> None:
    refused(quantize(model, out, *option), CONFIG, "'re:(' is no regular expression")
    assert not out.exists()


@pytest.mark.parametrize("override", ["down_proj", "down_proj:8", ":bits=8", "down_proj:bits=eight"])
def test_an_override_that_is_not_understood(override: str, model: Path, out: Path) -> None:
    outcome = quantize(model, out, "--override", override)
    assert outcome.exit_code == CONFIG
    assert "error: " in outcome.stderr
    assert not out.exists()


def test_nothing_left_to_quantize(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--skip", "*"), CONFIG, "nothing is left to quantize: skipped on request", "--skip")
    assert not out.exists()


@pytest.mark.parametrize("device", ["cuda:99", "tpu9", "mps", "meta"])
def test_a_device_that_is_not_there(device: str, model: Path, out: Path) -> None:
    refused(quantize(model, out, "--device", device), BACKEND, device, "cpu")
    assert not out.exists()


def test_a_revision_of_a_local_folder(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--revision", "main"), CONFIG, "no revision 'main'", "--revision")


@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--temperature", "-1")], ids=lambda option: option[0])
def test_nothing_to_generate(option: tuple[str, str], model: Path) -> None:
    outcome = llmq("generate", model, "--prompt", "x", *option)
    assert outcome.exit_code == 2
    assert option[0] in outcome.stderr


# ---- calibration


@pytest.mark.parametrize(
    ("name", "content", "found", "hint"),
    [
        ("empty.txt", b"", "empty.txt holds no text", "expected text"),
        ("blank.txt", b" \n\n \n", "blank.txt holds no text", "expected text"),
        ("short.txt", b"ten bytes.", "holds 11 tokens, fewer than one window of 32", "--seqlen"),
        ("latin1.txt", b"caf\xe9 au lait " * 100, "not UTF-8 text: byte 0xe9 at offset 3", "iconv"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "cut.jsonl is not valid JSON", ""),
        ("column.jsonl", b'{"texto": "a"}', "row 0 of", ""),
    ],
)
def test_a_calibration_text_that_is_useless(
    name: str, content: bytes, found: str, hint: str, model: Path, out: Path
) -> None:
    file = model.parent / name
    file.write_bytes(content)
    refused(quantize(model, out, calibration=file), CALIBRATION, found, hint)
    assert not out.exists()


def test_a_calibration_file_that_is_not_there(model: Path, out: Path) -> None:
    refused(quantize(model, out, calibration=model / "no.txt"), CALIBRATION, "no.txt is not a file", ".jsonl")
    assert not out.exists()


def test_no_calibration_text_and_no_hub(model: Path, out: Path) -> None:
    outcome = llmq("quantize", model, out)
    refused(
        outcome, CALIBRATION, "no calibration text was given, and the Hub's cannot be had", "--calibration text.txt"
    )
    assert not out.exists()


def test_no_evaluation_text_and_no_hub(model: Path) -> None:
    outcome = llmq("eval", model)
    refused(outcome, CALIBRATION, "the data set Salesforce/wikitext", "give a file that ends in .txt")
    assert "--calibration" not in outcome.stderr


@pytest.mark.parametrize("command", ["quantize", "eval", "generate"])
def test_no_tokenizer(command: str, model: Path, text: Path, out: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    more = {
        "quantize": (out, "--calibration", text), "eval": ("--text", text), "generate": ("--prompt", "x")
    }[command]  # fmt: skip
    refused(llmq(command, model, *more), CHECKPOINT, "model has no tokenizer", "copy tokenizer.json")
    assert not out.exists()


def test_a_tokenizer_that_cannot_be_read(model: Path, text: Path, out: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    refused(quantize(model, out, calibration=text), CHECKPOINT, "the tokenizer in", "copy tokenizer.json")
    assert not out.exists()


# ---- the output


def test_an_output_folder_with_files_in_it(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(quantize(model, out), CONFIG, "out is not empty: it holds thesis.txt", "--overwrite")
    assert contents(out) == {"thesis.txt": b"mine"}


def test_overwrite_replaces_the_model_and_nothing_else(model: Path, out: Path) -> None:
    assert quantize(model, out).exit_code == 0
    first = contents(out)
    (out / "thesis.txt").write_text("mine")
    refused(quantize(model, out), CONFIG, "out is not empty")
    assert quantize(model, out, "--overwrite", "--bits", "8").exit_code == 0
    second = contents(out)
    assert second.pop("thesis.txt") == b"mine"
    assert second.keys() == first.keys()
    assert b'"num_bits": 8' in second["config.json"]


def test_the_output_is_a_file(model: Path, text: Path) -> None:
    before = text.read_bytes()
    refused(quantize(model, text), CONFIG, "text.txt is a file, expected a folder", "another output folder")
    assert text.read_bytes() == before


@pytest.mark.parametrize("option", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("alias", ["model", "model/../model", "link"])
def test_the_output_is_the_model(alias: str, option: tuple[str, ...], model: Path) -> None:
    (model.parent / "link").symlink_to(model)
    before = contents(model)
    refused(quantize(model, model.parent / alias, *option), CONFIG, "is the model itself", "another output folder")
    assert contents(model) == before


def test_a_disk_that_says_it_is_full(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000))
    refused(quantize(model, out), STORAGE, "has 0.000 GB free, and the run needs", "another disk")
    assert not out.exists()


# A process that may write no file larger than so many bytes meets the same error as one on a disk that is full.
LIMITED = """
import json, resource, signal, sys
from pathlib import Path
from llmq.cli import main
limits = json.loads(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main()
    except SystemExit as leaving:
        print(limit, leaving.code, Path(sys.argv[3]).exists())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_disk_that_fills_up(model: Path, out: Path) -> None:
    """Where the first block (5 kB) does not fit nothing stays; where the model (70 kB) does not, the block is kept."""
    straight = out.with_name("straight")
    assert quantize(model, straight).exit_code == 0
    options = ("--method", "rtn", "--samples", "4", "--seqlen", "32", "--group-size", "32")
    command = [sys.executable, "-c", LIMITED, "[2000, 20000]", "quantize", str(model), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == [f"2000 {STORAGE} False", f"20000 {STORAGE} True"]
    assert done.stderr.count("error: cannot write") == done.stderr.count("File too large") == 2
    assert done.stderr.count("ulimit -f") == done.stderr.count("give the same command again") == 2
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in out.iterdir()] == [STAGING]
    again = quantize(model, out)
    assert "1 of 1 blocks were finished earlier" in again.stderr
    assert (out / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    assert not (out / STAGING).exists()


@pytest.mark.slow
def test_a_process_says_the_same(tmp_path: Path) -> None:
    refused(llmq_process("quantize", tmp_path / "nowhere"), CHECKPOINT, "neither a path on this machine", "config.json")
