"""Every tensor of a .gguf file that belongs to a block, the embedding or the head is read, or the file is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.errors import FormatError
from llmq.gguf import reader
from tests import builders

Checkpoints = Callable[..., Path]


def test_a_bias_that_config_json_does_not_know_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, out = checkpoint("llama", num_hidden_layers=1, attention_bias=True), tmp_path / "out"
    llmq.quantize(str(model), out, method="rtn", group_size=32, format="gguf", device="cpu")
    (file,) = out.glob("*.gguf")
    reader.open_skeleton(file, builders.CPU, torch.float32, None)
    other = shutil.copytree(out, tmp_path / "other")
    builders.change_json(other / "config.json", attention_bias=False)
    with pytest.raises(FormatError, match=r"does not use the tensor blk\.0\.attn_\w+\.bias"):
        reader.open_skeleton(other / file.name, builders.CPU, torch.float32, None)
