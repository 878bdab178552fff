"""What is left of the memory that a control group may use, from files like those of Linux."""

from pathlib import Path

import psutil
import pytest
import torch

from llmq import memory


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    file = tmp_path / "membership"
    file.write_text("9:name=systemd:/x\n4:memory:/job/step\n3:cpu,cpuacct:/\n0::/job/step\n")
    return file


def test_every_group_above_the_process_is_read(tmp_path: Path, membership: Path) -> None:
    group(tmp_path / "job" / "step", memory__max="max", memory__current=10)
    group(tmp_path / "job", memory__max=100, memory__current=30, memory__stat="anon 5\ninactive_file 8")
    group(tmp_path / "other", memory__max=50, memory__current=30)
    assert list(memory.left_of_groups(tmp_path, membership)) == [78]


def test_within_a_container_the_group_is_at_the_mount_point(tmp_path: Path, membership: Path) -> None:
    group(tmp_path, memory__max=100, memory__current=30)
    assert list(memory.left_of_groups(tmp_path, membership)) == [70]


def test_cgroups_of_version_1_are_read(tmp_path: Path, membership: Path) -> None:
    files = {"memory__limit_in_bytes": 100, "memory__usage_in_bytes": 30, "memory__stat": "total_inactive_file 5"}
    group(tmp_path / "memory" / "job", **files)
    assert list(memory.left_of_groups(tmp_path, membership)) == [75]


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(memory.left_of_groups(tmp_path, tmp_path / "none")) == []


def test_the_smallest_limit_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.spare(torch.device("cpu")) > 1000
    group(tmp_path, memory__max=1000, memory__current=30)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.spare(torch.device("cpu")) == 970
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: (100, psutil.RLIM_INFINITY))
    assert memory.spare(torch.device("cpu")) == 0, "more address space is in use than that"


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_DATA"), reason="needs RLIMIT_DATA of Linux")
def test_an_allocation_fails_before_the_group_is_full(tmp_path: Path) -> None:
    left = 100 * 2**20
    group(tmp_path, memory__max=2 * left, memory__current=left)
    too_many, before = 2 * left, psutil.Process().rlimit(psutil.RLIMIT_DATA)
    with memory.below_group_limit(torch.device("cpu"), tmp_path):
        with pytest.raises(RuntimeError) as raised:
            torch.empty(too_many, dtype=torch.uint8)
        assert memory.is_out_of_memory(raised.value)
    assert torch.empty(too_many, dtype=torch.uint8).numel() == too_many
    assert psutil.Process().rlimit(psutil.RLIMIT_DATA) == before


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_DATA"), reason="needs RLIMIT_DATA of Linux")
@pytest.mark.parametrize(("device", "bytes_left"), [("cuda", 2**20), ("cpu", 2**60)])
def test_a_gpu_and_a_group_without_a_real_limit_change_nothing(tmp_path: Path, device: str, bytes_left: int) -> None:
    group(tmp_path, memory__max=bytes_left, memory__current=0)
    before = psutil.Process().rlimit(psutil.RLIMIT_DATA)
    with memory.below_group_limit(torch.device(device), tmp_path):
        assert psutil.Process().rlimit(psutil.RLIMIT_DATA) == before
