"""`--calibration` as a user gives it: the model's own text, mixtures, and the manifest before and after a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.calibration import self_written
from llmq.checkpoint.staging import STAGING
from llmq.report.events import TextRead
from tests.command_line import llmq
from tests.runs import job, quantize, read_text, stop_in_block

OWN = {"method": "gptq", "calibration": ["self"]}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def interrupted(model: Path, out: Path, text: Path, **settings: Any) -> str:
    """A run that ends in its second block; returns the checksum of the text that it read."""
    events = stop_in_block(job(model, out, text, **settings), 1)
    [read] = (event for event in events if isinstance(event, TextRead))
    return str(read.manifest["sha256"])


def test_a_mixture_is_shown_before_the_work_and_by_inspect_afterwards(model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--method", "gptq", "--group-size", "32", "--samples", "8", "--seqlen", "32")
    done = llmq("quantize", model, tmp_path / "out", "--calibration", f"{text}:3 self:1", *options, "--json")
    assert done.exit_code == 0, done.stderr
    calibration = json.loads(done.stdout)["calibration"]  # the table is no part of the result
    assert [(record["source"], record["windows"]) for record in calibration["manifest"]] == [
        (str(text), 6),
        ("self", 2),
    ]
    table, _, work = done.stderr.partition("block 1/2")
    digest = calibration["sha256"][:16]
    assert work and digest in table and digest not in work
    assert "75%" in table and "self" in table and "Latin" in table
    inspected = llmq("inspect", tmp_path / "out")
    assert digest in inspected.stdout and "requested share" in inspected.stdout
    assert json.loads(llmq("inspect", tmp_path / "out", "--json").stdout)["calibration"] == calibration


def test_what_the_linter_says_is_said_once_and_kept(model: Path, tmp_path: Path) -> None:
    texts = [f"{number:03} of them, this one is no other" for number in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*texts, texts[0], ""])))
    options = ("--method", "gptq", "--group-size", "32", "--samples", "4", "--seqlen", "32")
    done = llmq("quantize", model, tmp_path / "out", "--calibration", file, *options)
    note = f"{file}: 1 of 14 documents are duplicates"
    assert done.stderr.count(note) == 1 and done.stderr.index(note) < done.stderr.index("block 1/2")
    assert llmq("inspect", tmp_path / "out").stdout.count(note) == 1


def test_a_model_that_wrote_its_own_text_is_the_same_again(model: Path, text: Path, tmp_path: Path) -> None:
    reports = [quantize(model, tmp_path / str(run), text, **OWN, seed=seed) for run, seed in enumerate((0, 0, 1))]
    digests = [(report.calibration or {})["sha256"] for report in reports]
    assert digests[0] == digests[1] != digests[2]
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in "01"]
    assert files[0] == files[1]
    assert not (tmp_path / "0" / STAGING).exists()


def test_an_interrupted_run_goes_on_with_the_text_that_it_wrote(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", {**OWN, "calibration": [f"{text}:1", "self:1"]}
    whole = quantize(model, tmp_path / "whole", text, **settings)
    checksum = interrupted(model, out, text, **settings)

    def not_again(*arguments: Any) -> None:
        raise AssertionError("the text is written a second time")

    monkeypatch.setattr(self_written, "write_rows", not_again)
    continued = quantize(model, out, text, **settings)
    assert [block.resumed for block in continued.blocks] == [True, False]
    assert (continued.calibration or {})["sha256"] == (whole.calibration or {})["sha256"] == checksum
    assert any("is used again" in note for note in continued.notes)
    files = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_a_text_of_another_seed_or_cut_short_is_written_anew(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checksum = interrupted(model, out, text, **OWN)
    kept = out / STAGING / "self.json"
    first = read_text(job(model, out, text, **OWN))
    assert first.sha256 == checksum and json.loads(kept.read_text())["windows"] == first.windows.tolist()
    other = read_text(job(model, out, text, **OWN, seed=1))
    assert not torch.equal(other.windows, first.windows)
    kept.write_text(kept.read_text()[:-20])
    again = read_text(job(model, out, text, **OWN))
    assert torch.equal(again.windows, first.windows) and not again.notes
