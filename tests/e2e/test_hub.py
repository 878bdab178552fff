"""Models and datasets of the Hub, served by a stand-in on this machine, from the command to the finished folder."""

import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from llmq.calibration import DEFAULT_SOURCES
from llmq.checkpoint.hub import locate, stored_bytes
from llmq.checkpoint.reader import Checkpoint
from llmq.forecast.sizes_and_costs import Configured
from tests.command_line import Outcome, llmq
from tests.hub_server import Hub, connected, serve

NAME = "owner/name"
QUICK = ("--method", "gptq", "--samples", "4", "--seqlen", "48", "--group-size", "16", "--scales", "minmax")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve() as served, connected(served, tmp_path / "cache"):
        yield served


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=1, dtype="float16")


def add_default_datasets(hub: Hub) -> None:
    """The two datasets of the default calibration text, laid out as on the Hub, with little text."""
    rows = [{"text": f"Document {number}. " + f"word {number} " * 40, "url": ""} for number in range(40)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:20]), buffer)
    lines = gzip.compress("\n".join(json.dumps(row) for row in rows[20:]).encode())
    card = "---\nconfigs:\n- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}\n---\n"
    hub.add(
        "allenai/c4",
        {"README.md": card.format("en", "en/c4-train.*.json.gz").encode(), "en/c4-train.00000-of-01024.json.gz": lines},
        kind="datasets",
    )
    hub.add(
        "HuggingFaceFW/fineweb-edu",
        {"README.md": card.format("sample-10BT", "sample/10BT/*").encode(),
         "data/CC-MAIN-2013-20/train-00000-of-00014.parquet": buffer.getvalue(),
         "sample/10BT/000_00000.parquet": buffer.getvalue()},
        kind="datasets",
    )  # fmt: skip


def quantize(out: Path, *arguments: str | Path) -> Outcome:
    return llmq("quantize", NAME, out, "--device", "cpu", *QUICK, *arguments)


def test_a_model_and_the_default_text_come_from_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add(NAME, model)
    add_default_datasets(hub)
    done = quantize(tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "out" / "llmq.json").read_text())
    assert record["calibration"]["sources"] == list(DEFAULT_SOURCES)
    assert [source["windows"] for source in record["calibration"]["manifest"]] == [2, 2]
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert f"base_model: {NAME}" in card and "base_model_relation: quantized" in card
    before = len(hub.requests)
    again = quantize(tmp_path / "out")
    assert again.exit_code == 0 and "finished already" in again.stderr
    assert not [line for line in hub.requests[before:] if "safetensors" in line]


def test_missing_default_text_names_the_way_out(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add(NAME, model)
    done = quantize(tmp_path / "out")
    assert done.exit_code == 5 and "the default text on the Hub cannot be read" in done.stderr
    assert "--calibration self" in done.stderr and not (tmp_path / "out").exists()


def test_plan_downloads_no_weights(hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    configured = Configured.read(NAME, 48, "cpu", None)  # what llmq plan reads
    assert configured.parameters.total > 0
    assert hub.downloads(".json")
    assert configured.stored_bytes == stored_bytes(NAME) == stored_bytes(str(model)) == Checkpoint.open(model).nbytes
    assert hub.downloads(".safetensors") and all("bytes=" in line for line in hub.downloads(".safetensors"))


@pytest.mark.parametrize(
    ("options", "token", "message", "hint"),
    [
        ({"gated": True}, True, "is gated", "accept the licence"),
        ({"private": True}, False, "neither a local folder nor a model on the Hub", "hf auth login"),
        (None, True, "neither a local folder nor a model on the Hub", "check the spelling"),
    ],
    ids=["gated", "private", "missing"],
)
def test_models_that_may_not_be_read(
    options: dict[str, Any] | None, token: bool, message: str, hint: str, model: Path, tmp_path: Path
) -> None:
    with serve() as hub, connected(hub, tmp_path / "cache", token="hf_stand_in" if token else None):
        if options is not None:
            hub.add(NAME, model, **options)
        done = quantize(tmp_path / "out")
        assert done.exit_code == 3 and message in done.stderr and hint in done.stderr


def test_revisions(hub: Hub, model: Path, tmp_path: Path) -> None:
    repository = hub.add(NAME, model)
    repository.commits.append("1" * 40)
    wrong = quantize(tmp_path / "out", "--revision", "no-such-branch")
    assert wrong.exit_code == 3 and "has no revision 'no-such-branch'" in wrong.stderr
    hub.requests.clear()
    right = quantize(tmp_path / "out", "--revision", "0" * 40, "--method", "rtn")
    assert right.exit_code == 0, right.stderr
    assert all("0" * 40 in line for line in hub.downloads()) and hub.downloads()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts of huggingface_hub."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_cut_connection_is_continued(hub: Hub, model: Path, tmp_path: Path, no_waiting: None) -> None:
    hub.add(NAME, model)
    hub.cut.append(10_000)
    assert (locate(NAME) / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert [line.rpartition(" ")[2] for line in hub.downloads("bytes=")] == ["bytes=8192-"]


def test_a_repeated_download_keeps_finished_files(hub: Hub, model: Path, tmp_path: Path, no_waiting: None) -> None:
    hub.add(NAME, model)
    hub.cut += [0] * 20
    failed = quantize(tmp_path / "out", "--method", "rtn")
    assert failed.exit_code == 3 and "repeat the command: downloaded files are kept" in failed.stderr
    hub.cut.clear()
    hub.requests.clear()
    assert quantize(tmp_path / "out", "--method", "rtn").exit_code == 0
    assert hub.downloads("config.json") == [] and len(hub.downloads(".safetensors")) == 1


def test_offline_uses_what_is_cached(hub: Hub, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hub.add(NAME, model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    missing = quantize(tmp_path / "out", "--method", "rtn")
    assert missing.exit_code == 3 and "HF_HUB_OFFLINE is set" in missing.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert quantize(tmp_path / "first", "--method", "rtn").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert quantize(tmp_path / "out", "--method", "rtn").exit_code == 0
    assert hub.requests == []


def test_a_half_cached_model_is_not_a_model_offline(hub: Hub, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hub.add(NAME, model)
    locate(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = quantize(tmp_path / "out", "--method", "rtn")
    assert done.exit_code == 3 and "Traceback" not in done.stderr and "try:" in done.stderr, done.stderr


# ---- llmq push


@pytest.fixture(scope="module")
def results(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two formats; copy it before changes."""
    out = tmp_path_factory.mktemp("results") / "out"
    model = checkpoint("llama", num_hidden_layers=1, dtype="float16")
    done = llmq("quantize", model, out, "--method", "rtn", "--group-size", "32", "--format", "gptq,gguf")
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture
def result(results: Path, tmp_path: Path) -> Path:
    """One model of the run, with a file of the user."""
    folder = shutil.copytree(results / "gptq", tmp_path / "model")
    (folder / "my-notes.md").write_text("private")
    return folder


def test_push_uploads_the_files_of_the_model(hub: Hub, result: Path) -> None:
    listed = llmq("push", result, NAME, "--dry-run", "--json")
    assert listed.exit_code == 0, listed.stderr
    assert hub.requests == [] and json.loads(listed.stdout)["left_out"] == ["my-notes.md"]
    done = llmq("push", result, NAME)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{hub.address}/{NAME}\n" and str(result) not in done.stdout
    repository = hub.repositories["models", NAME]
    assert repository.private and len(repository.commits) == 2
    sizes = {name: len(data) for name, data in repository.files.items() if name != "README.md"}
    expected = json.loads(listed.stdout)["files"]
    assert sizes == {name: size for name, size in expected.items() if name != "README.md"}
    assert repository.files["model.safetensors"] == (result / "model.safetensors").read_bytes()
    card = repository.files["README.md"].decode()
    assert f"$ vllm serve {NAME}" in card or f'from_pretrained("{NAME}")' in card
    hub.requests.clear()
    assert llmq("push", result, NAME).exit_code == 0
    assert not any("PUT" in line for line in hub.requests)  # the Hub has the file already


def test_a_pushed_model_is_verified_and_evaluated_by_its_id(hub: Hub, result: Path) -> None:
    assert llmq("push", result, NAME, "--public").exit_code == 0
    assert not hub.repositories["models", NAME].private
    done = llmq("verify", NAME)
    assert done.exit_code == 0, done.stderr


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "model.safetensors has changed"),
        (lambda folder: (folder / ".llmq-partial").mkdir(), "holds an unfinished run"),
        (lambda folder: (folder / "llmq.json").unlink(), "is not a result of llmq"),
        (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "LICENSE is not a file in"),
    ],
    ids=["damaged", "unfinished", "of another tool", "link"],
)
def test_push_refuses_what_is_not_a_finished_model(
    change: Callable[[Path], object], message: str, hub: Hub, result: Path
) -> None:
    change(result)
    done = llmq("push", result, NAME)
    assert done.exit_code == 3 and message in done.stderr
    assert hub.requests == []


def test_push_asks_for_one_of_several_formats(hub: Hub, results: Path) -> None:
    done = llmq("push", results, NAME)
    assert done.exit_code == 3 and "give one of them" in done.stderr and str(results / "gguf") in done.stderr
    assert hub.requests == []


def test_push_refuses_unsuitable_repositories(hub: Hub, result: Path) -> None:
    hub.add(NAME, {"README.md": b""})
    public = llmq("push", result, NAME)
    assert public.exit_code == 2 and "is public" in public.stderr
    hub.add(NAME, {"model-00001-of-00002.safetensors": b""}, private=True)
    other = llmq("push", result, NAME)
    assert other.exit_code == 2 and "holds other weights" in other.stderr
    for options in ((), ("--dry-run",)):
        invalid = llmq("push", result, "a b", *options)
        assert invalid.exit_code == 2 and "is not a valid name" in invalid.stderr
    assert all(repository.commits == ["0" * 40] for repository in hub.repositories.values())


def test_push_reports_what_the_hub_refuses(hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.writable = False
    refused = llmq("push", result, NAME)
    assert refused.exit_code == 7 and "does not let you write" in refused.stderr and "hf auth login" in refused.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = llmq("push", result, NAME)
    assert offline.exit_code == 7 and "HF_HUB_OFFLINE is set" in offline.stderr


def test_push_without_a_token_or_without_a_network(result: Path, tmp_path: Path, no_waiting: None) -> None:
    with serve() as hub, connected(hub, tmp_path / "cache", token=None):
        done = llmq("push", result, NAME)
        assert done.exit_code == 7 and "hf auth login" in done.stderr
    hub.address = "http://127.0.0.1:1"  # where nothing listens
    with connected(hub, tmp_path / "cache"):
        gone = llmq("push", result, NAME)
    assert gone.exit_code == 7 and "check the network" in gone.stderr
