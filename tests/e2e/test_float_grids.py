"""Whole runs with nvfp4 and mxfp4: tuned, interrupted, read back, and next to integers in one file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import Method, Tuning
from llmq.setting_fields import merged
from tests import builders
from tests.runs import stop_in_block, tensors_of

Checkpoints = Callable[..., Path]
TUNED = Method(
    rounding="gptq",
    alphas=(1.0,),
    refinements=("descent", "refit"),
    block_tuning=Tuning(steps=2, scales=1e-2, rounding=1e-2, tokens=96),
    tuning=Tuning(steps=2, scales=1e-2, rounding=1e-2, tokens=96),
    validation=0.25,
)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def job(model: Path, out: Path, text: Path, **settings: Any) -> Job:
    asked = merged(QuantConfig(), {"calibration": [text], "samples": 8, "seqlen": 48, **settings})
    return Job(str(model), out, asked, stages=TUNED, device="cpu")


@pytest.mark.parametrize("bits", ["nvfp4", "mxfp4"])
def test_a_tuned_run_is_read_back_and_resumes_to_the_same_bytes(
    bits: str, model: Path, text: Path, tmp_path: Path
) -> None:
    report = job(model, tmp_path / "whole", text, bits=bits).run()
    assert report.bits_per_weight == pytest.approx({"nvfp4": 4.5, "mxfp4": 4.25}[bits], abs=0.1)
    stop_in_block(job(model, tmp_path / "resumed", text, bits=bits), 1)
    job(model, tmp_path / "resumed", text, bits=bits).run()
    whole, resumed = (tensors_of(tmp_path / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name].view(torch.uint8), resumed[name].view(torch.uint8)) for name in whole)
    loaded, _ = llmq.load(tmp_path / "whole", device="cpu")
    weights = dict(llmq.dequantize(tmp_path / "whole"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(loaded.named_parameters())[name].float(), weights[name])


def test_blocks_of_fp8_next_to_integers_keep_one_scale_each(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    """Through GPTQ, descent, refit and both kinds of tuning; a layer without whole blocks gets a scale per row."""
    wide = checkpoint("llama", num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=4)
    overrides = ["*.down_proj:bits=fp8-block", "*.self_attn.*:bits=fp8-block"]
    report = job(wide, tmp_path / "out", text, bits=4, group_size=32, overrides=overrides).run()
    schemes = {layer.name.rpartition(".")[2]: layer.scheme for layer in report.layers}
    assert schemes["down_proj"] == schemes["q_proj"] == "fp8-block" and schemes["up_proj"] == "int4 g32 symmetric"
    assert schemes["k_proj"] == "fp8"  # 64 rows
    tensors, weights = tensors_of(tmp_path / "out"), dict(llmq.dequantize(tmp_path / "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    values, scales = tensors[name], tensors[f"{name}_scale"]
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (1, 2)
    expected = values.float() * scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(weights[name], expected)
    assert llmq.verify(tmp_path / "out").intact
    loaded, _ = llmq.load(tmp_path / "out", device="cpu")
    assert torch.equal(dict(loaded.named_parameters())[name].float(), expected)
    llmq.convert(tmp_path / "out", tmp_path / "floats", to="float")
    assert torch.equal(tensors_of(tmp_path / "floats")[name], expected)


def test_a_published_checkpoint_in_blocks_of_fp8_is_read(checkpoint: Checkpoints, tmp_path: Path) -> None:
    wide = checkpoint("llama", num_hidden_layers=1, hidden_size=128, intermediate_size=160, num_attention_heads=4)
    folder = shutil.copytree(wide, tmp_path / "model")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj"
    values = torch.randn(160, 128, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5], [0.03]])  # the last block has 32 rows
    tensors |= {f"{name}.weight": values, f"{name}.weight_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    builders.change_json(folder / "config.json", quantization_config=declared)
    expected = torch.cat([values[:128].float() * 0.5, values[128:].float() * scales[1]])
    assert torch.equal(dict(llmq.dequantize(folder))[f"{name}.weight"], expected)
    llmq.convert(folder, tmp_path / "floats", to="float")
    assert torch.equal(tensors_of(tmp_path / "floats")[f"{name}.weight"], expected)
    with pytest.raises(llmq.LlmqError, match="already quantized") as refused:
        llmq.quantize(str(folder), tmp_path / "out", method="rtn")
    assert "--to float" in refused.value.hint
    builders.change_json(folder / "config.json", quantization_config={**declared, "weight_block_size": [64, 64]})
    with pytest.raises(llmq.LlmqError, match=r"expected e4m3 in blocks of \[128, 128\]"):
        dict(llmq.dequantize(folder))


def test_a_weight_of_fp8_without_a_scale_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama", num_hidden_layers=1), tmp_path / "model")
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.0.mlp"
    for name in ("up_proj", "gate_proj"):
        tensors[f"{layer}.{name}.weight"] = torch.ones(128, 128).to(torch.float8_e4m3fn)
    tensors[f"{layer}.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    builders.change_json(folder / "config.json", quantization_config=declared)
    with pytest.raises(llmq.LlmqError, match=f"{layer}.gate_proj.weight in 8-bit floats, but not its scale"):
        dict(llmq.dequantize(folder))


def test_fused_layers_have_one_global_scale_and_others_other_grids(model: Path, text: Path, tmp_path: Path) -> None:
    overrides = ["*.down_proj:bits=8,group_size=32", "*.o_proj:bits=fp8"]
    job(model, tmp_path / "out", text, bits="nvfp4", overrides=overrides).run()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.1"
    for unit in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({float(tensors[f"{prefix}.{name}.weight_global_scale"]) for name in unit}) == 1
    assert tensors[f"{prefix}.mlp.down_proj.weight_packed"].dtype == torch.int32
    assert tensors[f"{prefix}.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert llmq.verify(tmp_path / "out").intact
    assert {layer.scheme for layer in llmq.inspect(tmp_path / "out").layers if layer.name.endswith("down_proj")} == {
        "int8 g32 symmetric"
    }
