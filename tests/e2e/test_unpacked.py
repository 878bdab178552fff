"""A packed checkpoint, block by block in float, is the model that its file says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.open_skeleton import open_skeleton
from tests.builders import skeleton_of, tokens


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_blocks_of_a_packed_checkpoint_compute_what_it_says(
    checkpoint: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    llama = checkpoint("llama")
    symmetric = format != "awq"
    llmq.quantize(llama, tmp_path / "out", method="rtn", group_size=32, format=format, symmetric=symmetric)
    ids = tokens(2, 24)
    walked = open_skeleton(Checkpoint.open(tmp_path / "out"), torch.device("cpu"), torch.float32)
    hidden = None
    for block, call in zip(walked.blocks, walked.record_all(ids), strict=True):
        block.load()
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
    with torch.no_grad():
        found = walked.logits(ids, hidden)
        model, _ = llmq.load(tmp_path / "out", device="cpu")
        expected = model(input_ids=ids).logits
        original = _logits(llama, ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (found - original).abs().max() > 1e-3 * expected.abs().max()  # packed, and not by chance the float model


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    walked = skeleton_of(folder)
    hidden = None
    for block, call in zip(walked.blocks, walked.record_all(ids), strict=True):
        block.load()
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
    return walked.logits(ids, hidden)
