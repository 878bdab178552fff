"""Every tensor of a module that the model has is used, or the checkpoint is refused by the name of the tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, FormatError
from llmq.runtime.open_skeleton import open_model
from llmq.verification.inspection import inspect
from llmq.verification.integrity import examine
from tests import builders
from tests.runs import job, quantize

Checkpoints = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj"


def with_tensors(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model in one file, after `change` was applied to its tensors."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adding(**tensors: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda existing: existing.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def opened(folder: Path) -> tuple[str, ...]:
    return open_model(Checkpoint.open(folder), torch.float32).left


@pytest.mark.parametrize(
    "name",
    [
        f"{UP}.weight_scale",  # of an 8-bit float whose quantization_config is gone
        f"{UP}.bias",  # of a layer that the configuration builds without a bias
        "model.layers.0.mlp.act_fn.scales",
        "model.layers.0.self_attn.q_norm.weight",  # a module that the configuration leaves out of a block
        "model.norm.bias",
    ],
)
def test_a_tensor_that_nobody_reads_is_refused_by_name(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    folder = with_tensors(
        checkpoint("llama"), tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(4)})
    )
    for command in (opened, llmq.load, inspect, lambda model: job(model, tmp_path / "out", tmp_path, method="rtn")):
        with pytest.raises(CheckpointError, match=name):
            command(folder)
    assert any(name in problem for problem in examine(folder).problems)


def test_tensors_of_modules_that_the_model_lacks_are_left_and_listed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    others = {"mtp.layers.0.up_proj.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}
    others |= {f"model.layers.3.{name}": torch.ones(4, 4) for name in ("eh_proj.weight", "mlp.up_proj.weight")}
    folder = with_tensors(checkpoint("llama"), tmp_path / "model", lambda tensors: tensors.update(others))
    assert set(opened(folder)) == set(inspect(folder).unused) == others.keys()
    report = quantize(folder, tmp_path / "out", tmp_path, method="rtn")
    assert {name.removesuffix(".weight") for name in others} <= report.left.keys()
    assert others.keys() <= set(Checkpoint.open(tmp_path / "out").names())


def test_what_transformers_drops_without_a_word_is_listed_too(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern for the additional block of a smaller model does not hide a tensor of a block of this one."""
    patterns = [r"^mtp.*", r"model\.layers\.3.*", r"model\.layers\.1.*"]
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    names = ("mtp.norm.weight", "model.layers.3.mlp.up_proj.weight")
    others = {name: torch.ones(4, 4) for name in names}
    folder = with_tensors(checkpoint("llama"), tmp_path / "model", lambda tensors: tensors.update(others))
    assert set(opened(folder)) == set(inspect(folder).unused) == set(names)
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    folder = with_tensors(folder, tmp_path / "other", lambda tensors: tensors.update({scale: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=scale):
        opened(folder)


def test_tables_that_old_versions_stored_and_biases_of_zeros_change_nothing(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        f"{UP}.bias": torch.zeros(64),
    }
    folder = with_tensors(checkpoint("llama"), tmp_path / "model", lambda tensors: tensors.update(tables))
    assert opened(folder) == ()


def test_a_configuration_with_fewer_blocks_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    builders.change_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"holds the block model\.layers\.2"):
        opened(folder)


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [("vocab_size", 300, "model.embed_tokens.weight"), ("intermediate_size", 96, r"model\.layers\.0\.mlp\.gate_proj")],
)
def test_shapes_are_compared_with_config_json_before_the_work(
    checkpoint: Checkpoints, tmp_path: Path, key: str, value: int, tensor: str
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    builders.change_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=tensor) as refused:
        job(folder, tmp_path / "out", tmp_path, method="rtn")
    assert (key == "vocab_size") == ("vocab_size" in refused.value.hint)


def test_a_missing_tensor_outside_the_blocks_is_noticed_before_the_work(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = with_tensors(checkpoint("llama"), tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"needs the tensor model\.norm\.weight"):
        job(folder, tmp_path / "out", tmp_path, method="rtn")


@pytest.mark.parametrize(
    ("prefix", "way_out"),
    [("base_model.model.", "merge the adapter first"), ("_orig_mod.", "before it is compiled")],
)
def test_names_of_a_wrapped_model_are_refused(
    checkpoint: Checkpoints, tmp_path: Path, prefix: str, way_out: str
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    builders.rename_tensors(folder, lambda name: prefix + name)
    with pytest.raises(CheckpointError, match=rf"the tensor {prefix}") as refused:
        opened(folder)
    assert way_out in refused.value.hint


@pytest.mark.parametrize("format_", ["gptq", "awq", "compressed-tensors"])
def test_a_part_of_a_packed_weight_is_not_enough(checkpoint: Checkpoints, tmp_path: Path, format_: str) -> None:
    settings = {"method": "rtn", "format": format_, "symmetric": False, "group_size": 32}
    quantize(checkpoint("llama"), tmp_path / "whole", tmp_path, **settings)
    parts = [name for name in Checkpoint.open(tmp_path / "whole").names() if name.startswith(f"{UP}.")]
    for part in parts:
        if part.endswith(("g_idx", "qzeros", "weight_zero_point")):
            continue  # some grids have none
        folder = with_tensors(tmp_path / "whole", tmp_path / part, lambda tensors, part=part: tensors.pop(part))
        for command in (inspect, llmq.load, lambda model: dict(llmq.dequantize(model))):
            with pytest.raises(FormatError, match=UP):
                command(folder)
        assert any(UP in problem for problem in examine(folder).problems)


def test_scales_of_an_activation_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantize(checkpoint("llama"), tmp_path / "whole", tmp_path, method="rtn", format="awq", symmetric=False)
    name = "model.layers.0.mlp.act_fn.scales"
    folder = with_tensors(tmp_path / "whole", tmp_path / "out", lambda tensors: tensors.update({name: torch.ones(64)}))
    for command in (inspect, llmq.load, lambda model: dict(llmq.dequantize(model))):
        with pytest.raises(FormatError, match=name):
            command(folder)


def test_more_layers_than_tensors_are_refused_before_the_model_is_built(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "many")
    builders.change_json(folder / "config.json", num_hidden_layers=255)
    with pytest.raises(CheckpointError, match="num_hidden_layers as 255, and the weights have"):
        open_model(Checkpoint.open(folder), torch.float32)
