"""The output folder of a run: commit, continue, finish, abandon."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.calibration.cache import OwnText
from llmq.checkpoint.lock import LOCK, FolderLock
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import Part, read_header
from llmq.checkpoint.sealed import write_sealed
from llmq.checkpoint.staging import REMOVED, STAGING
from llmq.checkpoint.writer import Writer
from llmq.errors import CheckpointError, ConfigError, StorageError

RUN = {"source": "abc", "config": {"bits": 4, "skip": ("lm_head",)}}
DOCUMENTS = {"config.json": '{"model_type": "toy"}', "quantize_config.json": "{}"}


def open_writer(
    out: Path, identity: Mapping[str, Any] = RUN, *, overwrite: bool = False, needed_bytes: int = 0
) -> Writer:
    return Writer.open(out, identity=identity, overwrite=overwrite, needed_bytes=needed_bytes)


def put(writer: Writer, index: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Commit a block, and wait until it is on disk."""
    writer.commit(index, tensors, record)
    writer.settle()


def block(index: int) -> dict[str, Tensor]:
    """4 int32 and 2 half-precision values: 20 bytes."""
    return {f"layers.{index}.qweight": torch.arange(4, dtype=torch.int32) + index,
            f"layers.{index}.scales": torch.full((2,), float(index), dtype=torch.float16)}  # fmt: skip


def source(folder: Path) -> tuple[list[Part], list[Path]]:
    """Tensors and a tokenizer of the model that is quantized."""
    folder.mkdir(exist_ok=True)
    save_file({"embed.weight": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(b"\x00 any bytes \xff")
    parts = [
        (folder / "model.safetensors", name, info) for name, info in read_header(folder / "model.safetensors").items()
    ]
    return parts, [folder / "tokenizer.json"]


def run(out: Path, source_folder: Path, *, blocks: int = 3, shard_bytes: int = 5 * 10**9, **options: Any) -> Writer:
    """A whole run."""
    writer = open_writer(out, **options)
    for index in range(blocks):
        if not writer.has(index):
            put(writer, index, block(index), {"error": index / 10})
    rest, files = source(source_folder)
    finish(writer, rest, files, DOCUMENTS, shard_bytes)
    return writer


def finish(
    writer: Writer,
    rest: Sequence[Part],
    files: Sequence[Path],
    documents: Mapping[str, str],
    shard_bytes: int = 5 * 10**9,
) -> None:
    """The end of a run that makes one model."""
    with writer.finishing() as final:
        writer.assemble(final, rest, {file.name: file for file in files}, documents, shard_bytes)


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_run_writes_one_file_in_order(tmp_path: Path) -> None:
    run(tmp_path / "out", tmp_path / "source")
    assert names_in(tmp_path / "out") == {"model.safetensors", "tokenizer.json", *DOCUMENTS}
    assert list(read_header(tmp_path / "out" / "model.safetensors")) == [
        *block(0),
        *block(1),
        *block(2),
        "embed.weight",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00 any bytes \xff"
    assert (tmp_path / "out" / "config.json").read_text() == DOCUMENTS["config.json"]
    expected = {**block(0), **block(1), **block(2), "embed.weight": torch.arange(6.0)}
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_committed_block_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    put(writer, 7, block(7), {"error": 0.5, "layers": [1, 2]})
    tensors, record = writer.read(7)
    assert record == {"error": 0.5, "layers": [1, 2]}
    assert set(tensors) == set(block(7))
    assert "layers.7.scales" in tensors
    assert "layers.8.scales" not in tensors
    assert all(tensors[name].equal(tensor) for name, tensor in block(7).items())
    assert writer.has(7)
    assert not writer.has(0)
    with pytest.raises(CheckpointError):
        writer.read(0)


def test_same_command_continues(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "out")
    put(first, 0, block(0), {"error": 0.0})
    first.abandon()
    second = open_writer(tmp_path / "out", dict(reversed(RUN.items())))
    assert (first.resumed_blocks, second.resumed_blocks, second.discarded) == (0, 1, False)
    assert second.has(0)
    assert not second.has(1)


def test_continued_run_writes_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "straight", tmp_path / "source")
    put(open_writer(tmp_path / "out"), 0, block(0), {"error": 0.0})
    run(tmp_path / "out", tmp_path / "source")
    for name in names_in(tmp_path / "straight"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_block_may_be_committed_again(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    put(writer, 0, block(0), {"round": 1})
    put(writer, 0, block(5), {"round": 2})
    tensors, record = writer.read(0)
    assert (set(tensors), record) == (set(block(5)), {"round": 2})


def test_finished_blocks_of_another_run_are_kept(tmp_path: Path) -> None:
    put(open_writer(tmp_path / "out"), 0, block(0), {})
    with pytest.raises(ConfigError, match="1 finished blocks of a run with other settings"):
        open_writer(tmp_path / "out", {**RUN, "source": "changed"})
    assert open_writer(tmp_path / "out").resumed_blocks == 1


def test_overwrite_discards_another_run_and_reports_it(tmp_path: Path) -> None:
    put(open_writer(tmp_path / "out"), 0, block(0), {})
    other = open_writer(tmp_path / "out", {**RUN, "source": "changed"}, overwrite=True)
    assert (other.discarded, other.resumed_blocks, other.has(0)) == (True, 0, False)


def test_another_run_replaces_a_run_without_blocks(tmp_path: Path) -> None:
    open_writer(tmp_path / "out")
    assert open_writer(tmp_path / "out", {**RUN, "source": "changed"}).discarded


def flip(file: Path, place: int) -> None:
    """Change one bit of a file; a negative place counts from its end."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def rename_a_tensor(staging: Path) -> None:
    file = staging / "00001.safetensors"
    file.write_bytes(file.read_bytes().replace(b"scales", b"scaler"))


def change_a_dtype(staging: Path) -> None:
    file = staging / "00001.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F16"', b'"I16"'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda staging: os.truncate(staging / "00001.safetensors", 100),
    "lost": lambda staging: (staging / "00001.safetensors").unlink(),
    "a bit of the first tensor": lambda staging: flip(staging / "00001.safetensors", -20),
    "a bit of the last tensor": lambda staging: flip(staging / "00001.safetensors", -1),
    "a name": rename_a_tensor,
    "a dtype": change_a_dtype,
    "the record": lambda staging: flip(staging / "00001.json", -10),
    "the record is empty": lambda staging: (staging / "00001.json").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_block_is_quantized_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    for index in range(3):
        put(writer, index, block(index), {"index": index})
    writer.abandon()
    damage(tmp_path / "out" / STAGING)
    again = open_writer(tmp_path / "out")
    assert (again.damaged_blocks, again.resumed_blocks) == ((1,), 2)
    assert [again.has(index) for index in range(3)] == [True, False, True]


@pytest.mark.parametrize("damage", DAMAGES)
def test_block_damaged_after_opening_is_not_part_of_the_model(damage: str, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    for index in range(3):
        put(writer, index, block(index), {"index": index})
    DAMAGES[damage](tmp_path / "out" / STAGING)
    rest, files = source(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"00001|truncated"):
        finish(writer, rest, files, DOCUMENTS)
    writer.abandon()
    assert names_in(tmp_path / "out") == {STAGING}
    assert open_writer(tmp_path / "out").damaged_blocks == (1,)


def test_block_damaged_during_the_run_raises_error(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    put(writer, 0, block(0), {})
    (tmp_path / "out" / STAGING / "00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        finish(writer, [], [], DOCUMENTS)
    writer.abandon()
    assert names_in(tmp_path / "out") == {STAGING}


@pytest.mark.parametrize("identity", ["", "{", "[]", '{"identity": null}'])
def test_staging_without_identity_belongs_to_no_run(identity: str, tmp_path: Path) -> None:
    put(open_writer(tmp_path / "out"), 0, block(0), {})
    (tmp_path / "out" / STAGING / "identity.json").write_text(identity)
    assert open_writer(tmp_path / "out", overwrite=True).discarded


def test_empty_folder_is_used(tmp_path: Path) -> None:
    assert open_writer(tmp_path).resumed_blocks == 0


def test_folder_with_other_files_is_refused_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt") as caught:
        open_writer(tmp_path)
    assert "--overwrite" in caught.value.hint
    assert caught.value.exit_code == 2
    assert names_in(tmp_path) == {"thesis.txt"}


def test_other_files_are_refused_and_blocks_kept(tmp_path: Path) -> None:
    put(open_writer(tmp_path), 0, block(0), {})
    (tmp_path / "thesis.txt").write_text("mine")
    for identity in (RUN, {}):
        with pytest.raises(ConfigError, match=r"thesis\.txt"):
            open_writer(tmp_path, identity)
    assert open_writer(tmp_path, overwrite=True).resumed_blocks == 1


def test_file_as_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_writer(tmp_path / "out", overwrite=True)


def test_overwriting_replaces_only_the_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, tmp_path / "source", shard_bytes=40)
    (out / "thesis.txt").write_text("mine")
    (out / "pytorch_model.bin").write_bytes(b"old")
    (out / "folder.safetensors").mkdir()
    (out / "config.json").write_text("old")
    run(out, tmp_path / "source", overwrite=True)
    kept = {"thesis.txt", "pytorch_model.bin", "folder.safetensors"}
    assert names_in(out) == {"model.safetensors", "tokenizer.json", *DOCUMENTS, *kept}
    assert (out / "config.json").read_text() == DOCUMENTS["config.json"]


def test_overwriting_removes_only_gguf_files_of_llmq(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in ("awq", "gptq"):
        (out / folder).mkdir(parents=True)
    for name in ("out.gguf", "renamed.gguf", "own.gguf", "awq/out.gguf", "gptq/out.gguf"):
        (out / name).write_bytes(b"old")
    (out / "llmq.json").write_text('{"checksums": {"renamed.gguf": "", "../own.gguf": ""}}')
    (out / "awq" / "llmq.json").write_text("{}")
    with open_writer(out, overwrite=True).finishing() as final:
        for folder in ("awq", "gptq"):
            (final / folder).mkdir()
            (final / folder / "config.json").write_text("{}")
    left = {file.relative_to(out).as_posix() for file in out.rglob("*.gguf")}
    assert left == {"own.gguf", "gptq/out.gguf"}  # without a record, the origin of the last file is unknown
    assert not list(out.rglob("llmq.json"))  # a record of deleted files


def test_new_folders_are_synced_before_blocks_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out", []

    def sync(folder: Path) -> None:
        seen.append((folder, (out / "awq" / "config.json").exists(), (out / STAGING / "identity.json").exists()))

    monkeypatch.setattr("llmq.checkpoint.writer.sync_folder", sync)
    with open_writer(out).finishing() as final:
        (final / "awq").mkdir()
        (final / "awq" / "config.json").write_text("{}")
    assert (out, True, True) in seen


def test_old_model_exists_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, tmp_path / "source", shard_bytes=40)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    writer = open_writer(out, overwrite=True)
    put(writer, 0, block(0), {})
    rest, _ = source(tmp_path / "source")
    with pytest.raises(CheckpointError, match="absent"):
        finish(writer, rest, [tmp_path / "absent"], DOCUMENTS)
    writer.abandon()
    assert {entry.name: entry.read_bytes() for entry in out.iterdir() if entry.is_file()} == before


def test_file_created_during_the_run_is_not_overwritten(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    put(writer, 0, block(0), {})
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"config\.json exists"):
        finish(writer, [], [], DOCUMENTS)
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "config.json").unlink()
    writer.abandon()
    assert open_writer(tmp_path).resumed_blocks == 1


def test_conflicting_folder_is_detected_before_deletion(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"config\.json exists"):
        finish(open_writer(tmp_path, overwrite=True), [], [], DOCUMENTS)
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


def test_duplicate_file_name_raises_value_error(tmp_path: Path) -> None:
    _, files = source(tmp_path / "source")
    with pytest.raises(ValueError, match="two files have the same name"):
        finish(open_writer(tmp_path / "out"), [], files, {"tokenizer.json": ""})


def test_same_writer_can_finish_again(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    put(writer, 0, block(0), {})
    rest, files = source(tmp_path / "source")
    with pytest.raises(CheckpointError):
        finish(writer, rest, [tmp_path / "absent"], DOCUMENTS)
    finish(writer, rest, files, DOCUMENTS)
    assert set(Checkpoint.open(tmp_path / "out").names()) == {*block(0), "embed.weight"}


def disk_with(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_too_little_space_is_reported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(1_049_999_999, monkeypatch)
    with pytest.raises(StorageError, match=r"1\.050 GB free, but the run needs 1\.050 GB") as caught:
        open_writer(tmp_path / "new" / "out", needed_bytes=10**9)
    assert caught.value.exit_code == 7
    assert names_in(tmp_path) == set()
    disk_with(1_050_000_000, monkeypatch)
    open_writer(tmp_path / "new" / "out", needed_bytes=10**9)


def test_existing_blocks_count_as_available_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(open_writer(tmp_path), 0, {"x": torch.zeros(10_000, dtype=torch.uint8)}, {})
    disk_with(100_000, monkeypatch)
    assert open_writer(tmp_path, needed_bytes=104_000).resumed_blocks == 1  # 109,200 needed, 10,000 present
    with pytest.raises(StorageError):
        open_writer(tmp_path, {"another": "run"}, needed_bytes=120_000)
    assert open_writer(tmp_path).resumed_blocks == 1  # the refusal deleted nothing


def test_abandoning_without_blocks_deletes_everything(tmp_path: Path) -> None:
    assert open_writer(tmp_path / "out").abandon() is False
    assert names_in(tmp_path) == set()


def test_abandoning_keeps_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert open_writer(tmp_path / "out").abandon() is False
    assert names_in(tmp_path / "out") == set()


def test_creator_of_the_folder_is_recorded(tmp_path: Path) -> None:
    open_writer(tmp_path / "out")
    open_writer(tmp_path / "out")
    assert open_writer(tmp_path / "out", {"another": "run"}).abandon() is False
    assert names_in(tmp_path) == set()


def test_abandoning_keeps_blocks_to_continue(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    put(writer, 0, block(0), {})
    assert writer.abandon() is True
    assert open_writer(tmp_path / "out").resumed_blocks == 1


def test_abandoning_after_the_end_has_no_effect(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    finish(writer, [], [], DOCUMENTS)
    assert writer.abandon() is False
    assert names_in(tmp_path / "out") == {"model.safetensors", *DOCUMENTS}


# ---- writing in a thread


def test_block_is_written_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "out")
    threads: list[str] = []
    commit = writer._staging.commit

    def noted(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        commit(*arguments)

    monkeypatch.setattr(writer._staging, "commit", noted)
    writer.commit(0, block(0), {})
    assert writer.has(0)
    name, tensor = next(iter(block(0).items()))
    assert writer.read(0)[0][name].equal(tensor)  # reading waits for it
    monkeypatch.setattr("llmq.memory.spare", lambda device: 0)
    writer.commit(1, block(1), {})
    assert [name.startswith("llmq-write") for name in threads] == [True, False]


def test_failed_write_is_reported_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "out")
    writer.commit(0, block(0), {})
    writer.settle()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._staging, "commit", full)
    writer.commit(1, block(1), {})
    with pytest.raises(StorageError, match="No space left"):
        writer.commit(2, block(2), {})
    assert writer.has(0) and not writer.has(1) and not writer.has(2)


def test_run_that_ends_keeps_the_block_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "out")
    commit = writer._staging.commit

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        commit(*arguments)

    monkeypatch.setattr(writer._staging, "commit", slow)
    writer.commit(0, block(0), {})
    assert writer.abandon()
    assert open_writer(tmp_path / "out").resumed_blocks == 1


def test_interrupt_while_a_block_is_written_keeps_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "out")
    writer.commit(0, block(0), {})

    def interrupted(pending: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmq.checkpoint.writer.wait", interrupted)
        writer.commit(1, block(1), {})
    assert writer.abandon()
    assert open_writer(tmp_path / "out").resumed_blocks == 1


def test_abandoning_keeps_text_that_the_model_generated(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "out")
    text = OwnText(tmp_path / "out" / STAGING, "model")
    text.remember(torch.zeros(2, 4, dtype=torch.int64), 2, seed=0)
    text.save()
    assert writer.abandon()
    open_writer(tmp_path / "out")
    assert text.find(2, 4, seed=0) is not None


@pytest.mark.parametrize("name", ["../mine.txt", "sub/../../mine.txt", "/mine.txt", "C:\\mine.txt", "link/mine.txt", 7])
def test_document_of_the_staging_folder_deletes_nothing_outside(name: object, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(open_writer(out), 0, block(0), {})
    (tmp_path / "mine.txt").write_text("mine")
    (out / "link").symlink_to(tmp_path)
    full = str(tmp_path / "mine.txt") if name == "/mine.txt" else name
    write_sealed(out / STAGING / "moving.json", {"files": [full, "link/x"]})
    assert open_writer(out).resumed_blocks == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_second_writer_of_a_folder_is_refused(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "out")
    put(first, 0, block(0), {})
    with pytest.raises(StorageError, match="another process is writing to"):
        open_writer(tmp_path / "out")
    with pytest.raises(StorageError, match="another process is writing to"):
        open_writer(tmp_path / "out", overwrite=True)
    first.abandon()
    second = open_writer(tmp_path / "out")
    rest, files = source(tmp_path / "source")
    finish(second, rest, files, DOCUMENTS)
    assert not (tmp_path / "out" / LOCK).exists()


def test_refused_run_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(10**9, monkeypatch)
    with pytest.raises(StorageError):
        open_writer(tmp_path / "new", needed_bytes=10**12)
    assert not (tmp_path / "new").exists()
    run(tmp_path / "full", tmp_path / "source")
    before = names_in(tmp_path / "full")
    with pytest.raises(ConfigError):
        open_writer(tmp_path / "full")
    assert names_in(tmp_path / "full") == before


def test_remains_of_a_removed_folder_are_deleted(tmp_path: Path) -> None:
    run(tmp_path / "out", tmp_path / "source")
    (tmp_path / "out" / REMOVED).mkdir()
    (tmp_path / "out" / REMOVED / "00000.json").write_text("{}")
    (tmp_path / "out" / LOCK).touch()
    Writer.clean(tmp_path / "out")
    assert names_in(tmp_path / "out") == {"model.safetensors", "tokenizer.json", *DOCUMENTS}


def test_damaged_identity_is_reported(tmp_path: Path) -> None:
    put(open_writer(tmp_path / "out"), 0, block(0), {})
    file = tmp_path / "out" / STAGING / "identity.json"
    document = json.loads(file.read_text())
    document["document"]["created_out"] = "changed"
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"a run whose identity\.json is damaged"):
        open_writer(tmp_path / "out")


@pytest.mark.parametrize("begun", [True, False])
def test_staging_of_a_finished_run_is_deleted_and_of_another_run_kept(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("llmq.checkpoint.staging.Staging.remove", lambda _: None)  # as if killed before it
        run(out, tmp_path / "source")
    if not begun:
        (out / STAGING / "moving.json").unlink()
    Writer.clean(out)
    assert (STAGING in names_in(out)) == (not begun)
    assert names_in(out) >= {"model.safetensors", *DOCUMENTS}


def test_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a process that was killed is taken over."""
    fcntl = pytest.importorskip("fcntl")

    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "this file system has no locks")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)  # that flock is not supported
    lock = FolderLock(tmp_path)
    with pytest.raises(StorageError, match="another process is writing"):
        FolderLock(tmp_path)
    owner = (tmp_path / LOCK).read_text()
    lock.release()
    assert not (tmp_path / LOCK).exists()
    assert owner.splitlines()[0] == str(os.getpid())
    (tmp_path / LOCK).write_text(owner.replace(str(os.getpid()), str(ended()), 1))
    FolderLock(tmp_path).release()


def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
