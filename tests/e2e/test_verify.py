"""`llmq verify`: a complete model passes, damage is reported, and a refusing engine sets the exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.verification import engines as serving
from llmq.verification.integrity import examine
from tests import builders, mixtures
from tests.command_line import llmq as command

CHECKPOINT, QUALITY = 3, 8


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    model = checkpoint("llama", num_hidden_layers=2)
    llmq.quantize(str(model), out, method="rtn", scales="minmax", group_size=16, format="gptq")
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the weights and remove their checksum."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    builders.change_json(folder / "llmq.json", checksums={})


def test_a_finished_model_has_no_problems(packed: Path) -> None:
    done = command("verify", packed)
    assert done.exit_code == 0
    for text in ("14, all unpacked without error", "6 files match", "SGLang", "llama.cpp"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_every_weight_is_unpacked_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = PackedWeights.read

    def counted(self: PackedWeights, module: str) -> QuantizedTensor:
        read.append(module)
        return plain(self, module)

    monkeypatch.setattr(PackedWeights, "read", counted)
    examined = examine(packed)
    assert not examined.problems and len(read) == len(set(read)) == examined.packed


def test_verify_as_json(packed: Path) -> None:
    result = json.loads(command("verify", packed, "--json").stdout)
    assert result["integrity"]["packed"] == 14 and result["integrity"]["problems"] == []
    assert result["engines"]["SGLang"] == {"loads": True, "gpus": [1, 2]}
    assert result["engines"]["vLLM"] == {"loads": False, "gpus": []}  # because of groups of 16
    assert {"engine", "rule", "outcome", "asks", "found", "remedy", "source", "gpus"} == set(result["findings"][0])


def test_a_float_model_is_verified_too(checkpoint: Callable[..., Path]) -> None:
    done = command("verify", checkpoint("llama", num_hidden_layers=2), "--for", "transformers")
    assert done.exit_code == 0
    assert "no checksums were recorded" in done.stderr


@pytest.mark.parametrize(
    ("engines", "exit_code"),
    [(("sglang",), 0), (("sglang:2", "transformers"), 0), (("sglang:4",), QUALITY), (("vllm",), QUALITY),
     (("sglang", "llama.cpp"), QUALITY)],
)  # fmt: skip
def test_a_refusing_engine_sets_the_exit_code(packed: Path, engines: tuple[str, ...], exit_code: int) -> None:
    options = [word for engine in engines for word in ("--for", engine)]
    done = command("verify", packed, "--quick", *options)
    assert done.exit_code == exit_code
    assert ("would not load in" in done.stderr) == bool(exit_code)


@pytest.mark.parametrize("engine", ["ollama", "vllm:two", "vllm:0", ""])
def test_an_unknown_engine_is_refused(packed: Path, engine: str) -> None:
    done = command("verify", packed, "--for", engine)
    assert done.exit_code == 2
    assert "expected one of vllm, sglang, transformers, llama.cpp, mlx" in done.stderr


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t["model.layers.0.mlp.up_proj.scales"].fill_(torch.nan), "model.layers.0.mlp.up_proj has"),
        (lambda t: t["model.norm.weight"].fill_(torch.inf), "model.norm.weight has 32 values that are NaN or infinite"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.scales": torch.ones(3, 64)}), "scales is float32 (3, 64)"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.qzeros"), "qzeros is missing"),
        (lambda t: t.pop("model.norm.weight"), "needs the tensor model.norm.weight"),
        (lambda t: t["model.layers.1.mlp.down_proj.g_idx"].fill_(9), "the group index holds 9 to 9"),
    ],
    ids=["scales", "norm", "shape", "zeros", "tensor", "index"],
)
def test_damage_is_detected(copy: Path, edit: Callable[[dict[str, Any]], object], words: str) -> None:
    change(copy, edit)
    done = command("verify", copy)
    assert done.exit_code == CHECKPOINT
    assert "is broken" in done.stderr and words in done.stderr


def test_all_problems_are_reported_at_once(copy: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"].fill_(torch.nan)
        tensors["model.layers.0.mlp.up_proj.scales"].fill_(torch.nan)

    change(copy, edit)
    assert len(json.loads(command("verify", copy, "--json").stdout)["integrity"]["problems"]) == 2


def test_a_flipped_bit_is_detected_by_the_checksum(copy: Path) -> None:
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)
    done = command("verify", copy)
    assert done.exit_code == CHECKPOINT
    assert "model.safetensors has changed" in done.stderr


def test_a_truncated_file_is_reported(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    done = command("verify", copy)
    assert done.exit_code == CHECKPOINT
    assert "is truncated" in done.stderr


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = command("verify", tmp_path)
    assert done.exit_code == CHECKPOINT


def test_shards_of_another_model_are_reported(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "model-00001-of-00002.safetensors")
    findings = [finding for finding in serving.check(copy) if finding.rule == "no stray shards"]
    assert findings[0].found == ("model-00001-of-00002.safetensors do not belong to this model",)
    assert command("verify", copy, "--quick", "--for", "sglang").exit_code == QUALITY


def test_act_order_is_reported(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.g_idx": torch.arange(64).int() % 4}))
    findings = [finding for finding in serving.check(copy) if finding.rule == "no g_idx"]
    assert findings[0].found == ("model.layers.1.mlp.down_proj: its columns are grouped by act-order",)


def test_a_dry_run_lists_compatible_engines(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("quantize", checkpoint("llama", num_hidden_layers=2), tmp_path / "out", "--method", "rtn", "--dry-run")
    done = command(*arguments, "--format", "gptq,awq", "--group-size", "16")
    assert done.exit_code == 0
    assert "engines for gptq" in done.stdout and "engines for awq" in done.stdout
    assert "groups of 16, but only 32, 64, 128 and one group per row are supported" in done.stdout
    predicted = json.loads(command(*arguments, "--format", "gptq", "--asymmetric", "--json").stdout)["serving"]
    assert any(finding["rule"] == "gptq grids" and finding["engine"] == "vLLM" for finding in predicted["gptq"])
    assert not (tmp_path / "out").exists()


def test_findings_of_a_dry_run_match_the_result(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("--method", "rtn", "--group-size", "16", "--override", "v_proj:bits=8")
    model = checkpoint("llama", num_hidden_layers=2)
    planned = json.loads(command("quantize", model, tmp_path / "out", *arguments, "--dry-run", "--json").stdout)
    command("quantize", model, tmp_path / "out", *arguments)
    made = [finding.to_dict() for finding in serving.check(tmp_path / "out")]
    assert json.loads(json.dumps(made)) == planned["serving"]["compressed-tensors"]
    assert any(finding["rule"] == "one scheme for fused layers" for finding in made)


@pytest.mark.parametrize(
    ("method", "message"), [("bitsandbytes", "quant_method is 'bitsandbytes'"), ("fp8", "8-bit floats with")]
)
def test_an_unsupported_format_is_not_reported_as_broken(copy: Path, method: str, message: str) -> None:
    builders.change_json(copy / "config.json", quantization_config={"quant_method": method})
    done = command("verify", copy)
    assert done.exit_code == CHECKPOINT
    assert message in done.stderr and "broken" not in done.stderr


def test_a_packed_mixture_with_biases_has_no_problems(tmp_path: Path) -> None:
    """transformers has the biases of the experts in one matrix, the file has one bias per expert."""
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.gpt_oss()))
    llmq.quantize(str(model), tmp_path / "out", method="rtn", scales="minmax", group_size=16)
    examined = examine(tmp_path / "out")
    assert not examined.problems
    done = command("verify", tmp_path / "out", "--quick", "--for", "vllm")
    assert done.exit_code == QUALITY


def test_missing_biases_of_stacked_experts_are_reported(tmp_path: Path) -> None:
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.gpt_oss()))
    change_file = load_file(model / "model.safetensors")
    del change_file["model.layers.1.mlp.experts.down_proj_bias"]
    save_file(change_file, model / "model.safetensors", metadata={"format": "pt"})
    examined = examine(model)
    assert any("model.layers.1.mlp.experts.down_proj_bias" in problem for problem in examined.problems)


def test_unknown_compatibility_fails_the_check(copy: Path) -> None:
    builders.change_json(copy / "config.json", quantization_config={
        "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "packing_format": "auto_round",
    })  # fmt: skip
    done = command("verify", copy, "--quick", "--for", "vllm")
    assert done.exit_code == QUALITY
    assert "is not known to load in vLLM on 1 GPU" in done.stderr and "unknown" in done.stdout
    assert json.loads(command("verify", copy, "--quick", "--json").stdout)["engines"]["vLLM"]["loads"] is None
