"""The float model is run on a few tokens first: a broken one is refused before anything is computed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.errors import CheckpointError
from llmq.model.passes.streams import Stream
from llmq.report.events import Progress
from llmq.report.record import BlockReport
from llmq.steps import float_probe
from llmq.steps.float_probe import probe, probe_tokens
from llmq.verification.integrity import examine
from tests import builders
from tests.runs import job, quantize, stop

Checkpoints = Callable[..., Path]


def test_a_model_that_computes_nan_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or infinite values: .* output of the block model\.layers\.1"):
        job(folder, tmp_path / "out", tmp_path, method="rtn").run()
    assert not (tmp_path / "out").exists()


def test_a_sound_model_is_run_once(checkpoint: Checkpoints) -> None:
    events: list[object] = []
    assert probe(builders.skeleton_of(checkpoint("llama")), 8, events.append) == []
    assert events == [Progress("float model checked", done, 3) for done in (1, 2, 3)]


def test_tokens_are_from_the_whole_vocabulary() -> None:
    assert probe_tokens(101, 5).tolist() == [[0, 25, 50, 75, 100]]


def test_a_model_whose_blocks_share_keys_is_noted(checkpoint: Checkpoints) -> None:
    (note,) = probe(builders.skeleton_of(checkpoint("gemma3n", num_kv_shared_layers=1)), 8, lambda event: None)
    assert "was not run" in note and "share the keys" in note


def test_an_error_of_llmq_is_no_note(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the code of a model may fail in the probe."""
    skeleton = builders.skeleton_of(checkpoint("llama"))

    def fails(*_: object, **__: object) -> None:
        raise ValueError("a model of another shape")

    with monkeypatch.context() as changed:
        changed.setattr(Stream, "outputs", fails)
        changed.setattr(float_probe, "PACKAGE", Path(__file__).parent)
        with pytest.raises(ValueError, match="another shape"):
            probe(skeleton, 8, lambda event: None)
    monkeypatch.setattr(type(skeleton.blocks[0].module), "forward", fails)
    assert probe(skeleton, 8, lambda event: None) == [float_probe.NOT_RUN.format("a model of another shape")]


def test_a_run_that_continues_does_not_repeat_the_probe(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(job(checkpoint("llama"), tmp_path / "out", text, method="rtn").run, lambda e: isinstance(e, BlockReport))
    monkeypatch.setattr(float_probe, "probe", lambda *_: pytest.fail("the probe was repeated"))
    assert quantize(checkpoint("llama"), tmp_path / "out", text, method="rtn").blocks[0].resumed


def test_infinite_masks_of_old_checkpoints_have_no_effect(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    """`masked_bias` of GPT-NeoX was -1e9, which float16 stores as -inf."""
    model = shutil.copytree(checkpoint("neox"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-float("inf"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    quantize(model, tmp_path / "out", text, method="rtn")
    assert not examine(tmp_path / "out").problems
