"""A run writes its report from the start. The finished folder has it for each format, next to the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmq.checkpoint import PAGE_FILES
from llmq.checkpoint.staging import STAGING
from tests.command_line import llmq
from tests.runs import job, quantize, stop_in_block

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def test_an_unfinished_run_has_a_report_and_the_finished_one_replaces_it(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.report.pages.RENEWED", 0.0)
    out = tmp_path / "out"
    stop_in_block(job(model, out, text, method="gptq"), 1)
    assert [entry.name for entry in out.iterdir()] == [STAGING]
    page = (out / STAGING / "report.html").read_text()
    assert "1 of 2 blocks" in page and "model.layers.0" in page and 'id="again"' in page
    report = quantize(model, out, text, method="gptq")
    page = (out / "report.html").read_text()
    assert 'id="again"' not in page and "model.layers.1" in page
    values = json.loads((out / "report.json").read_text())
    assert values["finished"] and [block["path"] for block in values["blocks"]] == [b.path for b in report.blocks]
    assert all(block["host_bytes"] > 10**7 and block["activation_outlier"] >= 1 for block in values["blocks"])
    scales = sum(entry["count"] for entry in values["scales"])
    assert scales == sum(count for layer in report.layers for _, count in layer.scales) > 100
    assert (out / "layers.csv").read_text().count("\n") == 1 + len(report.layers)


def test_the_report_does_not_belong_to_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "out", tmp_path / "changed"
    report = quantize(model, out, text, method="rtn", group_size=32, format=["gptq", "awq"])
    assert not set(PAGE_FILES) & {Path(name).name for name in report.checksums}
    assert all((out / name / file).is_file() for name in ("gptq", "awq") for file in PAGE_FILES)
    assert llmq("report", out).exit_code == 0
    for name in PAGE_FILES:
        (out / "gptq" / name).unlink()
    assert llmq("verify", out / "gptq").exit_code == 0
    assert llmq("convert", out / "awq", changed, "--to", "compressed-tensors").exit_code == 0
    assert all((changed / name).is_file() for name in PAGE_FILES)  # its own
