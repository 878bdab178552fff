"""Hidden states: the same bits wherever they lie, in whatever order they are read; and where they are put."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq import memory
from llmq.errors import CheckpointError, StorageError
from llmq.memory import HOST
from llmq.model.passes.hidden_states import DEVICE_SHARE, HOST_SHARE, HiddenStates, Place, Storage

GPU = torch.device("cuda")
ORDERS = [[0], [4], range(5), range(1, 4), [4, 3, 2, 1, 0], [2, 2], [0, 1, 4, 3], [3, 4, 0, 1, 2]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=list(Place), ids=lambda place: place.name)
def states(request: pytest.FixtureRequest, tmp_path: Path) -> HiddenStates:
    """On the CPU `DEVICE` and `HOST` are the same memory."""
    return HiddenStates(Storage(HOST, request.param, tmp_path / "states"), "text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outer", [(), (3,)])
def test_states_are_read_in_any_order(states: HiddenStates, dtype: torch.dtype, outer: tuple[int, ...]) -> None:
    """Written in batches of two; gemma3n has a dimension in front of the sequences."""
    expected = random(*outer, 5, 4, 8, dtype=dtype)
    assert not states
    for start in range(0, 5, 2):
        batch = range(start, min(start + 2, 5))
        states.write(batch, expected[..., batch.start : batch.stop, :, :])
    assert states
    for order in ORDERS:
        values = states.read(order)
        assert values.dtype == dtype and torch.equal(values, expected[..., list(order), :, :])


def test_writes_replace_earlier_states(states: HiddenStates) -> None:
    expected = random(5, 4, 8)
    states.write(range(5), torch.zeros(5, 4, 8))
    states.write([3, 1], expected[[3, 1]])
    assert torch.equal(states.read([1, 3]), expected[[1, 3]])
    assert not states.read([0, 2, 4]).any()
    states.write(range(5), expected)
    assert torch.equal(states.read(range(5)), expected)


def test_views_and_gradients_are_written_as_plain_values(states: HiddenStates) -> None:
    expected = random(8, 4, 2).requires_grad_(True)
    states.write(range(2), expected.permute(2, 1, 0))
    values = states.read(range(2))
    assert torch.equal(values, expected.permute(2, 1, 0).detach()) and not values.requires_grad


def test_clear_frees_memory_and_files(states: HiddenStates, tmp_path: Path) -> None:
    states.clear()  # of nothing
    states.write(range(2), random(2, 4, 8))
    states.clear()
    assert not states and not states._parts and not list(tmp_path.glob("states/*"))
    states.write([0], random(1, 4, 8))
    assert torch.equal(states.read([0]), random(1, 4, 8))


def on_disk(folder: Path) -> HiddenStates:
    return HiddenStates(Storage(HOST, Place.FILE, folder), "text")


def test_a_file_has_raw_values_in_the_order_of_sequences(tmp_path: Path) -> None:
    states, expected = on_disk(tmp_path), random(3, 4, 8)
    states.write([2, 0], expected[[2, 0]])
    states.write([1], expected[[1]])
    assert (tmp_path / "text").read_bytes() == expected.numpy().tobytes()
    assert not states._parts, "nothing is in memory"


@pytest.mark.parametrize("left", [0, 1, 3 * 4 * 8 * 4 - 1])
def test_a_truncated_file_is_an_error(tmp_path: Path, left: int) -> None:
    states = on_disk(tmp_path)
    states.write(range(3), random(3, 4, 8))
    with (tmp_path / "text").open("rb+") as file:
        file.truncate(left)
    with pytest.raises(CheckpointError, match="text: .* sequence 2"):
        states.read([2])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    states = on_disk(tmp_path)
    states.write(range(3), random(3, 4, 8))
    (tmp_path / "text").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        states.read([2])


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    states = on_disk(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        states.write(range(3), random(3, 4, 8))


# ---- where they are put


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets what is free on the host and on a GPU."""

    def set_free(host: int, gpu: int) -> None:
        monkeypatch.setattr(memory, "spare", lambda device: host if device.type == "cpu" else gpu)

    return set_free


def test_states_are_on_the_device_if_they_fit(free: Callable[[int, int], None], tmp_path: Path) -> None:
    free(1000 * HOST_SHARE, 100 * DEVICE_SHARE)
    places = [Storage.choose(size, GPU, tmp_path) for size in (100, 101, 1000, 1001)]
    assert [storage.place for storage in places] == [Place.DEVICE, Place.HOST, Place.HOST, Place.FILE]
    assert all(storage.device == GPU and storage.folder == tmp_path for storage in places)


def test_states_of_a_cpu_run_are_in_memory_or_in_files(free: Callable[[int, int], None], tmp_path: Path) -> None:
    free(1000 * HOST_SHARE, 0)
    places = [Storage.choose(size, HOST, tmp_path).place for size in (1, 1000, 1001)]
    assert places == [Place.HOST, Place.HOST, Place.FILE]


def test_storage_knows_whether_it_takes_device_memory() -> None:
    assert [Storage(GPU, place).takes_device_memory for place in Place] == [True, False, False]
    assert [Storage(HOST, place).takes_device_memory for place in Place] == [True, True, False]


def test_states_are_in_memory_if_there_is_no_folder(free: Callable[[int, int], None]) -> None:
    free(10, 10)
    assert Storage.choose(1000, GPU).place is Place.HOST
    assert Storage.choose(1000, HOST).place is Place.HOST
    states = HiddenStates(Storage(HOST, Place.FILE), "text")  # a place that cannot be had is memory as well
    states.write([0], random(1, 4, 8))
    assert torch.equal(states.read([0]), random(1, 4, 8))
