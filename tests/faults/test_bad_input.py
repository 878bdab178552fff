"""Invalid models: exit code, problem and hint in the message, no traceback, and no files left in the output folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import builders
from tests.command_line import llmq, llmq_process
from tests.faults.refusals import CHECKPOINT, UNSUPPORTED, WEIGHTS, quantize, refused

DOWN = "model.layers.0.mlp.down_proj.weight"

Llama = Callable[..., Path]


def change_weights(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def shard_by_index(model: Path, named: str) -> None:
    """The same weights as a shard, with an index that maps every tensor to the file `named`."""
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    names = load_file(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))


def test_missing_model_path_is_refused(tmp_path: Path, out: Path) -> None:
    refused(
        quantize(tmp_path / "nowhere", out),
        CHECKPOINT,
        "nowhere' is neither a local path",
        "a folder with a config.json",
    )
    assert not out.exists()


def test_hub_id_without_network_is_refused(out: Path) -> None:
    refused(quantize("nobody/nothing", out), CHECKPOINT, "nobody/nothing is neither a local folder", "check the path")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect"])
def test_folder_without_config_is_refused(command: str, model: Path, out: Path) -> None:
    (model / "config.json").unlink()
    more = {"quantize": (out,), "generate": ("--prompt", "x")}.get(command, ())
    refused(llmq(command, model, *more), CHECKPOINT, "model has no config.json", "that holds the model's config.json")
    assert not out.exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_invalid_config_json_is_refused(content: str, model: Path, out: Path) -> None:
    (model / "config.json").write_text(content)
    refused(quantize(model, out), CHECKPOINT, "config.json", "download or copy the file again")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect"])
def test_truncated_shard_is_refused(command: str, model: Path, out: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-1000])
    more = {"quantize": (out,), "generate": ("--prompt", "x")}.get(command, ())
    problem = f"{WEIGHTS} is truncated: found {len(data) - 1000} bytes, expected {len(data)}"
    refused(llmq(command, model, *more), CHECKPOINT, problem, "copy the file again")
    assert not out.exists()


def test_corrupted_header_is_refused(model: Path, out: Path) -> None:
    data = bytearray((model / WEIGHTS).read_bytes())
    data[20:30] = b"\xff" * 10
    (model / WEIGHTS).write_bytes(data)
    refused(quantize(model, out), CHECKPOINT, "the header cannot be parsed", "copy the file again")
    assert not out.exists()


def test_index_with_a_missing_file_is_refused(model: Path, out: Path) -> None:
    shard_by_index(model, "model-00002-of-00002.safetensors")
    problem = "names model-00002-of-00002.safetensors, which is not in the folder"
    refused(quantize(model, out), CHECKPOINT, problem, "the missing file")
    assert not out.exists()


def test_index_outside_the_folder_is_refused(model: Path, checkpoint: Llama, out: Path) -> None:
    outside = checkpoint("llama") / WEIGHTS
    assert outside.exists()
    shard_by_index(model, f"../{outside.relative_to(model.parents[1])}")
    refused(quantize(model, out), CHECKPOINT, "expected a safetensors file in the folder", "do not trust")
    assert not out.exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_non_finite_weight_is_refused(name: str, value: str, model: Path, out: Path) -> None:
    change_weights(model, name, float(value))
    problem = f"{name} has 1 values that are NaN or infinite, expected finite values"
    refused(quantize(model, out), CHECKPOINT, problem, "the checkpoint is damaged")
    assert not out.exists()


def test_nan_in_a_later_block_leaves_no_model(checkpoint: Llama, tmp_path: Path, out: Path) -> None:
    model = shutil.copytree(checkpoint("llama", num_hidden_layers=2), tmp_path / "two")
    change_weights(model, DOWN.replace("0", "1"), float("nan"))
    refused(quantize(model, out), CHECKPOINT, "model.layers.1.mlp.down_proj.weight has 1 values", "is damaged")
    assert not out.exists()


def test_weights_that_do_not_match_the_config_are_refused(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", intermediate_size=96)
    refused(quantize(model, out), CHECKPOINT, "has the shape (64, 32), expected (96, 32)", "config")
    assert not out.exists()


def test_missing_layer_weights_are_refused(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", num_hidden_layers=2)
    problem = "needs the tensor model.layers.1.self_attn.q_proj.weight, which the checkpoint does not hold"
    refused(quantize(model, out), CHECKPOINT, problem, "check that the checkpoint is complete")
    assert not out.exists()


def test_pickled_weights_are_refused(model: Path, out: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    refused(quantize(model, out), CHECKPOINT, "only pickled weights (pytorch_model.bin)", "safetensors")
    assert not out.exists()


def test_quantized_model_is_refused(model: Path, tmp_path: Path, out: Path) -> None:
    assert quantize(model, tmp_path / "first").exit_code == 0
    refused(quantize(tmp_path / "first", out), UNSUPPORTED, "is already quantized (compressed-tensors)", "unquantized")
    assert not out.exists()


SMALL = {"vocab_size": builders.VOCABULARY, "num_heads": 4, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_encoder_is_refused(command: str, tmp_path: Path, out: Path) -> None:
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, **SMALL)
    builders.save_model(tmp_path / "bert", transformers.BertForMaskedLM(config))
    more = {"quantize": (out,), "generate": ("--prompt", "x")}[command]
    problem = "holds BertForMaskedLM, expected a causal language model"
    refused(llmq(command, tmp_path / "bert", *more), UNSUPPORTED, problem, "a decoder that generates text")
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_encoder_decoder_is_refused(command: str, tmp_path: Path, out: Path) -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, **SMALL)
    builders.save_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
    more = {"quantize": (out,), "generate": ("--prompt", "x")}[command]
    problem = "holds T5ForConditionalGeneration, expected a causal language model"
    refused(llmq(command, tmp_path / "t5", *more), UNSUPPORTED, problem, "encoder-decoders are not supported")
    assert not out.exists()


def test_custom_code_is_not_run_without_permission(model: Path, out: Path, tmp_path: Path) -> None:
    """Nor does the command wait for an answer to the prompt of transformers ("run it? [y/N]")."""
    ran = tmp_path / "ran"
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    builders.change_json(
        model / "config.json", model_type="mystery", auto_map=code, architectures=["MysteryForCausalLM"]
    )
    (model / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    refused(quantize(model, out), UNSUPPORTED, "contains custom code", "--trust-remote-code")
    assert not ran.exists()
    assert not out.exists()


def test_unknown_architecture_is_refused(model: Path, out: Path) -> None:
    builders.change_json(model / "config.json", model_type="mystery")
    refused(quantize(model, out), UNSUPPORTED, "mystery", "a newer transformers may know it")
    assert not out.exists()


@pytest.mark.slow
def test_separate_process_reports_the_same_error(tmp_path: Path) -> None:
    refused(llmq_process("quantize", tmp_path / "nowhere"), CHECKPOINT, "neither a local path", "config.json")
