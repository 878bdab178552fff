"""`--rotate` on whole models: the function is preserved, the gain is reported, and other stages can be combined."""

from pathlib import Path

import pytest
import torch

import llmq
from llmq.methods import Method
from tests import builders
from tests.runs import float_model, logits, quantize, relative, tensors_of, windows_of


def model_with_outliers(folder: Path, name: str, dtype: str) -> Path:
    """Four blocks with 4 query heads and 2 value heads of 16; one channel per head is large in W_v and W_o."""
    model = builders.causal_model(builders.CONFIGS[name](hidden_size=64, num_hidden_layers=4), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "v_proj.weight" in name:
            parameter.data[::16] *= 4
        if "o_proj.weight" in name:
            parameter.data[:, ::16] *= 4
    return builders.save_model(folder, model)


def test_fast_reports_the_gain_of_rotations(tmp_path: Path, text: Path) -> None:
    model = model_with_outliers(tmp_path / "model", "llama", "float32")
    report = quantize(model, tmp_path / "out", text, method="fast", rotate=True, samples=12)
    gains = [gain for block in report.blocks for gain in block.gains]
    assert [gain.stage for gain in gains] == ["rotation"] * 4
    (summary,) = [stage for stage in report.stages if stage.stage == "rotation"]
    assert (summary.kept, summary.layers, summary.kind) == (sum(gain.kept for gain in gains), 4, "blocks")
    assert 0 < summary.kept and summary.change < 0
    assert report.settings["rotate"] is True


@pytest.mark.parametrize("transforms", [("rotation",), ("rotation", "awq")], ids=" ".join)
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_rotations_preserve_the_function(tmp_path: Path, text: Path, name: str, transforms: tuple[str, ...]) -> None:
    """Only rounding to 256 levels may differ, as for rtn. The error of a wrong rotation is of the order of 1."""
    model = model_with_outliers(tmp_path / "model", name, "bfloat16")
    windows = windows_of(model, text)
    expected, distance = logits(float_model(model, {}), windows), {}
    plain = Method(rounding="rtn", validation=0.25)
    for label, method in (("plain", plain), ("rotated", Method("rtn", transforms, validation=0.25))):
        report = quantize(model, tmp_path / label, text, stages=method, bits=8)
        distance[label] = relative(logits(llmq.load(tmp_path / label, device="cpu")[0], windows), expected)
    assert any(gain.kept for block in report.blocks for gain in block.gains if gain.stage == "rotation")
    plain_weights, rotated = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "rotated")
    assert any(not torch.equal(plain_weights[key], rotated[key]) for key in plain_weights if "v_proj" in key)
    assert distance["rotated"] < 1.5 * distance["plain"] < 0.1
