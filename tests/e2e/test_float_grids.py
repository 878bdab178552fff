"""Whole runs with nvfp4 and mxfp4: tuned, interrupted, read back, and next to integers in one file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import Method, Tuning
from llmq.setting_fields import merged
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
