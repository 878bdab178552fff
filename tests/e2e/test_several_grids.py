"""`--format compressed-tensors,mlx,gguf:q4_k_m`: one command, one run per grid, each in its folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from llmq._quantize import run_each
from llmq.checkpoint.staging import STAGING
from llmq.config import QuantConfig
from llmq.errors import ConfigError, StorageError
from llmq.export import save
from llmq.gguf.folder import gguf_name
from llmq.job import Job
from llmq.report.events import Event
from llmq.report.record import BlockReport, Report
from llmq.setting_fields import merged
from llmq.steps import separate_grids
from tests.command_line import llmq as command
from tests.runs import assert_same_weights, files_of, stop

pytest.importorskip("gguf", reason="needs the package gguf")

FORMATS = "compressed-tensors,mlx,gguf:q4_k_m"
SETTINGS: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 32, "format": FORMATS}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", dtype="bfloat16", num_hidden_layers=2)


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command writes."""
    folder = tmp_path_factory.mktemp("several") / "llama-4bit"
    done = command(
        "quantize", model, folder, "--method", "rtn", "--scales", "minmax", "--group-size", "32", "--format", FORMATS,
        "--log-json", folder.with_suffix(".log"), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    folder.with_suffix(".json").write_text(done.stdout)
    folder.with_suffix(".err").write_text(done.stderr)
    return folder


def test_one_command_writes_what_two_commands_would(model: Path, out: Path, tmp_path: Path) -> None:
    assert {entry.name for entry in out.iterdir()} == {"compressed-tensors", "mlx", "gguf-q4_k_m"}
    assert (out / "gguf-q4_k_m" / "llama-4bit-q4_k_m.gguf").is_file()
    alone = tmp_path / "llama-4bit-q4_k_m"
    llmq.quantize(str(model), alone, method="rtn", format="gguf:q4_k_m")
    assert (out / "gguf-q4_k_m" / "llama-4bit-q4_k_m.gguf").read_bytes() == (
        alone / "llama-4bit-q4_k_m.gguf"
    ).read_bytes()
    assert_same_weights(out / "mlx", out / "compressed-tensors")


def test_every_folder_has_a_record_and_a_report(out: Path) -> None:
    for name in ("compressed-tensors", "mlx", "gguf-q4_k_m"):
        assert command("verify", out / name).exit_code == 0
        assert (out / name / "report.html").is_file()
    record = json.loads((out / "gguf-q4_k_m" / "llmq.json").read_text())
    assert "--group-size and --asymmetric, --scales are for the other formats" in record["notes"][0]
    assert "further" not in record


def test_the_output_names_both_runs(out: Path) -> None:
    report, messages = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".err").read_text()
    assert report["settings"]["format"] == ["compressed-tensors", "mlx"]
    assert [further["settings"]["format"] for further in report["further"]] == ["gguf:q4_k_m"]
    assert "run 1 of 2: compressed-tensors, mlx" in messages and "run 2 of 2: gguf:q4_k_m" in messages
    events = [json.loads(line) for line in out.with_suffix(".log").read_text().splitlines()]
    assert [event["event"] for event in events].count("Planned") == 2  # the log of the first run is kept


def test_the_same_command_again_makes_nothing(model: Path, out: Path) -> None:
    before = files_of(out / "gguf-q4_k_m")
    events: list[Event] = []
    report = llmq.quantize(str(model), out, on_event=events.append, **SETTINGS)
    assert not any(isinstance(event, BlockReport) for event in events)
    assert [further.output for further in report.further] == [str(out / "gguf-q4_k_m")]
    assert files_of(out / "gguf-q4_k_m") == before


def test_an_interrupted_command_continues_in_the_second_run(model: Path, out: Path, tmp_path: Path) -> None:
    again, blocks = tmp_path / "llama-4bit", 0

    def in_the_second_run(event: Event) -> bool:
        nonlocal blocks
        blocks += isinstance(event, BlockReport)
        return blocks == 3

    stop(lambda on_event: llmq.quantize(str(model), again, on_event=on_event, **SETTINGS), in_the_second_run)
    assert {entry.name for entry in again.iterdir()} == {"compressed-tensors", "mlx", "gguf-q4_k_m"}
    assert [entry.name for entry in (again / "gguf-q4_k_m").iterdir()] == [STAGING]
    report = llmq.quantize(str(model), again, **SETTINGS)
    assert report.further[0].blocks[0].resumed
    file = "gguf-q4_k_m/llama-4bit-q4_k_m.gguf"
    assert (again / file).read_bytes() == (out / file).read_bytes()


def test_a_refusal_of_one_grid_comes_before_the_first_run(model: Path, tmp_path: Path) -> None:
    unknown = shutil.copytree(model, tmp_path / "model")
    (unknown / "tokenizer.json").unlink()  # without which llama.cpp reads no text
    with pytest.raises(llmq.LlmqError):
        llmq.quantize(str(unknown), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_later_run_is_checked_before_the_first_run(model: Path, tmp_path: Path) -> None:
    users = tmp_path / "out" / "gguf-q4_k_m" / "notes.txt"
    users.parent.mkdir(parents=True)
    users.write_text("mine")
    with pytest.raises(ConfigError, match="gguf-q4_k_m is not empty: it holds notes.txt"):
        llmq.quantize(str(model), tmp_path / "out", **SETTINGS)
    done = command("quantize", model, tmp_path / "out", "--method", "rtn", "--format", FORMATS)
    assert done.exit_code == 2 and "is not empty" in done.stderr and "run 1 of 2" not in done.stderr
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["gguf-q4_k_m"]


def test_the_disk_must_hold_what_all_runs_write(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(format: str) -> Job:
        settings = merged(QuantConfig(), {"method": "rtn", "format": format})
        return Job(str(model), tmp_path / "out" / format.replace(":", "-"), settings, device="cpu")

    def run(number: int, job: Job) -> Report:
        raise AssertionError("started")

    small, large = job("gguf:q2_k"), job("gguf:q8_0")
    enough_for_one = save.copies(large.plan.settings.formats) * large.plan.expected_bytes * 21 // 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=enough_for_one))
    large.require_possible()
    with pytest.raises(StorageError, match="the disk of .*gguf-q8_0 has"):
        run_each([small, large], run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * enough_for_one))
    with pytest.raises(AssertionError, match="started"):
        run_each([small, large], run)


def test_a_file_has_the_name_of_a_recipe_only_if_it_is_the_recipe() -> None:
    folder = Path("llama/gguf-q4_k_m")
    assert gguf_name(folder, "gguf:q4_k_m") == "llama-q4_k_m.gguf"
    assert gguf_name(folder, "gguf:q5_k_m") == gguf_name(folder) == "gguf-q4_k_m.gguf"
    assert gguf_name(Path("llama"), "gguf:q4_k_m") == "llama.gguf"


def test_the_settings_of_each_run() -> None:
    given = merged(QuantConfig(), {"format": "gguf:q8_0,awq,gguf:q2_k", "bits": 4, "group_size": 64, "skip": ["*.0.*"]})
    runs = separate_grids.runs("m", given, "out")
    assert [(run.settings.format, str(run.out)) for run in runs] == [
        ("awq", str(Path("out/awq"))),
        ("gguf:q8_0", str(Path("out/gguf-q8_0"))),
        ("gguf:q2_k", str(Path("out/gguf-q2_k"))),
    ]
    assert [run.settings.scheme.group_size for run in runs] == [64, 128, 128]
    assert [run.settings.skip for run in runs] == [("*.0.*",)] * 3
    assert [len(run.notes) for run in runs] == [0, 1, 1]
    several = merged(QuantConfig(), {"format": "gguf:q8_0,gguf:q2_k", "bits": 3})
    assert [run.settings.scheme.bits for run in separate_grids.runs("m", several, None)] == [3, 3]  # which is refused
    with pytest.raises(ConfigError, match="2 processes make one grid per command"):
        separate_grids.runs("m", given, "out", processes=2)


def test_what_needs_one_grid_refuses_several(model: Path, tmp_path: Path) -> None:
    settings = merged(QuantConfig(), SETTINGS)
    with pytest.raises(ConfigError, match="this run needs one grid"):
        Job(str(model), tmp_path / "out", settings, device="cpu")
    done = command("plan", model, "--format", FORMATS, "--fit", "1GB")
    assert done.exit_code == 2 and "--fit needs one grid" in done.stderr
    assert "--format compressed-tensors,mlx" in done.stderr


def test_a_dry_run_shows_every_grid(model: Path, tmp_path: Path) -> None:
    done = command("quantize", model, tmp_path / "out", "--format", FORMATS, "--group-size", "32", "--dry-run")
    assert done.exit_code == 0
    assert "int4 g32" in done.stdout and "q4_k" in done.stdout.lower() and "compatible engines for mlx" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_recipe_counts_embedding_and_head_as_packed(model: Path, out: Path, tmp_path: Path) -> None:
    import gguf

    settings = merged(QuantConfig(), {"method": "rtn", "format": "gguf:q4_k_m"})
    planned = Job(str(model), tmp_path / "out", settings, device="cpu").plan.expected_bytes
    written = gguf.GGUFReader(out / "gguf-q4_k_m" / "llama-4bit-q4_k_m.gguf").tensors
    assert planned == pytest.approx(sum(int(tensor.n_bytes) for tensor in written), rel=0.02)
