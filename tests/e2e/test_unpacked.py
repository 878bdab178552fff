"""A packed checkpoint that is run block by block in float equals the dequantized model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.open_skeleton import open_skeleton
from tests.builders import skeleton_of, tokens


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_packed_blocks_equal_the_dequantized_model(
    checkpoint: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    llama = checkpoint("llama")
    symmetric = format != "awq"
    llmq.quantize(llama, tmp_path / "out", method="rtn", group_size=32, format=format, symmetric=symmetric)
    ids = tokens(2, 24)
    skeleton = open_skeleton(Checkpoint.open(tmp_path / "out"), torch.device("cpu"), torch.float32)
    hidden = None
    for block, call in zip(skeleton.blocks, skeleton.record_all(ids), strict=True):
        block.load()
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
    with torch.no_grad():
        output = skeleton.logits(ids, hidden)
        model, _ = llmq.load(tmp_path / "out", device="cpu")
        expected = model(input_ids=ids).logits
        original = _logits(llama, ids)
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (output - original).abs().max() > 1e-3 * expected.abs().max()  # the quantized model, not the float model


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    skeleton = skeleton_of(folder)
    hidden = None
    for block, call in zip(skeleton.blocks, skeleton.record_all(ids), strict=True):
        block.load()
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
    return skeleton.logits(ids, hidden)
