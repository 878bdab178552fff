"""Output folders that are not empty, and full disks: existing files and finished blocks are kept."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmq.checkpoint.staging import STAGING
from tests.command_line import ROOT, environment
from tests.faults.refusals import CONFIG, STORAGE, WEIGHTS, contents, quantize, refused


def test_non_empty_output_folder_is_refused(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(quantize(model, out), CONFIG, "out is not empty: it holds thesis.txt", "--overwrite")
    assert contents(out) == {"thesis.txt": b"mine"}


def test_overwrite_replaces_only_the_model(model: Path, out: Path) -> None:
    assert quantize(model, out).exit_code == 0
    first = contents(out)
    (out / "thesis.txt").write_text("mine")
    refused(quantize(model, out, "--bits", "8"), CONFIG, "out is not empty")
    assert quantize(model, out, "--overwrite", "--bits", "8").exit_code == 0
    second = contents(out)
    assert second.pop("thesis.txt") == b"mine"
    assert second.keys() == first.keys()
    assert b'"num_bits": 8' in second["config.json"]


def test_output_path_that_is_a_file_is_refused(model: Path, text: Path) -> None:
    before = text.read_bytes()
    refused(quantize(model, text), CONFIG, "text.txt is a file, expected a folder", "another output folder")
    assert text.read_bytes() == before


@pytest.mark.parametrize("option", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("alias", ["model", "model/../model", "link"])
def test_output_equal_to_the_model_is_refused(alias: str, option: tuple[str, ...], model: Path) -> None:
    (model.parent / "link").symlink_to(model)
    before = contents(model)
    refused(quantize(model, model.parent / alias, *option), CONFIG, "is the model itself", "another output folder")
    assert contents(model) == before


def test_one_output_equal_to_the_model_is_refused(model: Path) -> None:
    source = model.rename(model.parent / "gptq")
    before = contents(source)
    refused(
        quantize(source, source.parent, "--format", "awq,gptq", "--overwrite"),
        CONFIG, "is the model itself", "another output folder",
    )  # fmt: skip
    assert contents(source) == before


def test_too_little_free_space_is_refused(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000))
    refused(quantize(model, out), STORAGE, "has 0.000 GB free, but the run needs", "another disk")
    assert not out.exists()


# A limit on the size of files (in bytes) causes the same kind of error as a full disk.
LIMITED = """
import json, resource, signal, sys
from pathlib import Path
from llmq.cli import main
limits = json.loads(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main()
    except SystemExit as leaving:
        print(limit, leaving.code, Path(sys.argv[3]).exists())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_full_disk_keeps_finished_blocks(model: Path, out: Path) -> None:
    """If the first block (5 kB) does not fit, no file is left; if the model (70 kB) does not fit, the block is kept."""
    straight = out.with_name("straight")
    assert quantize(model, straight).exit_code == 0
    options = ("--method", "rtn", "--samples", "4", "--seqlen", "32", "--group-size", "32")
    command = [sys.executable, "-c", LIMITED, "[2000, 20000]", "quantize", str(model), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == [f"2000 {STORAGE} False", f"20000 {STORAGE} True"]
    assert done.stderr.count("error: cannot write") == done.stderr.count("File too large") == 2
    assert done.stderr.count("ulimit -f") == done.stderr.count("repeat the command") == 2
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in out.iterdir()] == [STAGING]
    again = quantize(model, out)
    assert "1 of 1 blocks were finished earlier" in again.stderr
    assert (out / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    assert not (out / STAGING).exists()
