"""Reading ahead: the same tensors as from the disk, read in a thread, with no more memory than there is."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq import memory
from llmq.checkpoint.read_ahead import COMING_SHARE, ReadAhead
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError
from llmq.runtime.open_skeleton import open_skeleton

NBYTES = 1024  # of each tensor below
TENSORS = {
    name: torch.randn(NBYTES // 4, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abcdef")
}
Made = Callable[..., ReadAhead]


class Disk:
    """Tensors that are read, by which threads; `gate` holds the reading threads back while it is closed."""

    def __init__(self) -> None:
        self.threads: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, name: str) -> Tensor:
        self.threads.append((name, threading.current_thread().name))
        if name not in TENSORS:
            raise CheckpointError(f"no tensor {name}")
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(timeout=60)
        return TENSORS[name].clone()

    def by_main(self) -> list[str]:
        return [name for name, thread in self.threads if not thread.startswith("llmq-read")]

    def ahead(self) -> list[str]:
        return [name for name, thread in self.threads if thread.startswith("llmq-read")]


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.gate.set()  # no thread is left waiting


@pytest.fixture
def made(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A reader while memory is ample."""

    def make() -> ReadAhead:
        monkeypatch.setattr(memory, "spare", lambda device: memory.AMPLE_BYTES)
        return ReadAhead(disk.read, lambda name: NBYTES)

    return make


def test_tensors_equal_those_on_the_disk(made: Made, disk: Disk) -> None:
    read = made()
    for _ in range(3):
        read.expect("ab")
        for name in "abcdef":
            assert torch.equal(read(name), TENSORS[name])


def test_expected_tensors_are_read_in_a_thread(made: Made, disk: Disk) -> None:
    read = made()
    read.expect(["a", "b"])
    assert torch.equal(read("b"), TENSORS["b"]) and torch.equal(read("a"), TENSORS["a"])
    assert torch.equal(read("c"), TENSORS["c"])
    assert sorted(disk.ahead()) == ["a", "b"] and disk.by_main() == ["c"]
    assert read.reads == {"a": 1, "b": 1, "c": 1}
    assert torch.equal(read("a"), TENSORS["a"]) and read.reads["a"] == 2, "nothing is kept"


def test_reading_ahead_does_not_wait(made: Made, disk: Disk) -> None:
    read = made()
    disk.gate.clear()
    read.expect(["a", "b"])
    assert torch.equal(read("c"), TENSORS["c"]), "what is not expected is read meanwhile"
    disk.gate.set()
    assert torch.equal(read("a"), TENSORS["a"])


def test_wrong_expectations_are_dropped(made: Made, disk: Disk) -> None:
    read = made()
    disk.gate.clear()
    read.expect("abc")
    read.expect("de")
    disk.gate.set()
    assert torch.equal(read("d"), TENSORS["d"]) and torch.equal(read("e"), TENSORS["e"])
    assert set(disk.ahead()) <= {"a", "d", "e"}, "what was not begun is never read"
    assert torch.equal(read("b"), TENSORS["b"]) and disk.by_main() == ["b"]


@pytest.mark.parametrize("ahead", [False, True])
def test_errors_are_raised_by_the_call(made: Made, disk: Disk, ahead: bool) -> None:
    read = made()
    if ahead:
        read.expect(["a", "missing"])  # which raises nothing
    assert torch.equal(read("a"), TENSORS["a"])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no tensor missing"):
            read("missing")
    assert torch.equal(read("b"), TENSORS["b"])


def test_nothing_is_read_ahead_under_little_memory(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "spare", lambda device: memory.AMPLE_BYTES - 1)
    read = ReadAhead(disk.read, lambda name: NBYTES)
    read.expect("abc")
    assert torch.equal(read("a"), TENSORS["a"]) and torch.equal(read("a"), TENSORS["a"])
    assert disk.by_main() == ["a", "a"] and not disk.ahead()
    assert read._thread is None


def test_only_what_fits_is_read_ahead(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "AMPLE_BYTES", 0)
    monkeypatch.setattr(memory, "spare", lambda device: 2 * NBYTES * COMING_SHARE)
    read = ReadAhead(disk.read, lambda name: NBYTES)
    read.expect("abc")
    assert read._thread is None and not disk.threads, "three do not fit"
    read.expect("ab")
    assert torch.equal(read("a"), TENSORS["a"]) and disk.ahead()[0] == "a"


def test_a_float_checkpoint_is_read_ahead(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block is at work the next one is read."""
    threads: dict[str, list[str]] = {}
    tensor = Checkpoint.tensor

    def noted(self: Checkpoint, name: str) -> Tensor:
        threads.setdefault(name, []).append(threading.current_thread().name)
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    opened = Checkpoint.open(checkpoint("llama"))
    skeleton = open_skeleton(opened, torch.device("cpu"), torch.float32)
    skeleton.read_ahead(1)
    skeleton.read_ahead(3)  # of which there is none
    skeleton.read_ahead(-1)
    skeleton.blocks[1].load()
    names = skeleton.blocks[1].stored_names()
    assert {name: [thread.startswith("llmq-read") for thread in threads[name]] for name in names} == {
        name: [True] for name in names
    }
    assert all(
        torch.equal(parameter, tensor(opened, f"{skeleton.blocks[1].path}.{name}"))
        for name, parameter in skeleton.blocks[1].module.named_parameters()
    )
