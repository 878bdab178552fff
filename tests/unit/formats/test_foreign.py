"""Checkpoints of other tools are refused by name, with a way out, by what they have in common with no other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq import formats
from llmq.errors import FormatError, UnsupportedModelError
from llmq.formats.foreign import FORMATS, of_block
from llmq.runtime.load import load_model
from llmq.verification.inspection import inspect
from tests import builders
from tests.runs import job

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize("method", [method for foreign in FORMATS for method in foreign.methods])
def test_a_quant_method_has_a_name_and_a_way_out(method: str) -> None:
    foreign = of_block({"quant_method": method.replace("-", "_").upper()})
    assert foreign is not None
    if method not in {known for layout in formats.readable() for known in layout.quant_methods}:
        with pytest.raises(FormatError, match=rf"\({foreign.name}\)") as refused:
            formats.detect({"quant_method": method})
        assert refused.value.hint == foreign.way_out


@pytest.mark.parametrize(
    ("config", "tensor", "name"),
    [
        ({"quip_params": {"codebook": "E8P12"}}, "", "QuIP#"),
        ({}, "model.layers.0.mlp.up_proj.trellis", "exllamav3"),
        ({}, "model.layers.0.mlp.up_proj.W_q", "HQQ"),
        ({}, "model.layers.0.mlp.up_proj.weight_scale_inv", "8-bit floats"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "", "bitsandbytes"),
    ],
)
def test_every_command_refuses_it(
    checkpoint: Checkpoints, tmp_path: Path, config: dict[str, Any], tensor: str, name: str
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    builders.change_json(folder / "config.json", **config)
    if tensor:
        tensors = load_file(folder / "model.safetensors") | {tensor: torch.ones(4)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for command in (inspect, load_model):
        with pytest.raises(FormatError, match=name):
            command(folder)
    with pytest.raises(UnsupportedModelError, match=rf"already quantized \({name}\)"):
        job(folder, tmp_path / "out", tmp_path, method="rtn")
