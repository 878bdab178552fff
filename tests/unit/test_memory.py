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
