"""A full disk at every write and a power cut at every flush: the same command then makes the same files.

Both are simulated in the process of a toy run, once per place. A power cut loses what was not flushed: `os.fsync` of a
file records its contents, and that of a folder the names in it. After the cut the disk has either only the recorded
names, or all names with the recorded contents, as file systems differ in this; unrecorded contents are empty.

LLMQ_EVERY_FAULT=1 tries all places; otherwise every eighth one is tried.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.faults.toy_run import FORKS, in_a_process, source_model

EVERY = 1 if os.environ.get("LLMQ_EVERY_FAULT") else 8
SECONDS = 960 / EVERY
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

FULL_DISK_EVERYWHERE = (
    FORKS
    + """
import errno

class Full:
    def __init__(self, file):
        self._file = file
    def __getattr__(self, name):
        return getattr(self._file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self._file.close()
    def write(self, data):
        step()
        return self._file.write(data)

calls, full_at = 0, None

def step():
    global calls
    calls += 1
    if calls == full_at:
        raise OSError(errno.ENOSPC, "No space left on device")

def counted(call):
    def wrapper(*arguments, **options):
        step()
        return call(*arguments, **options)
    return wrapper

really_open = Path.open

def opened(path, mode="r", *arguments, **options):
    file = really_open(path, mode, *arguments, **options)
    return Full(file) if "w" in mode else file

def filling(n):
    global full_at
    full_at = n
    Path.open = opened
    os.fsync = counted(lambda descriptor: None)
    for name in ("replace", "rename", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    run(folder / "out")

os.fsync = lambda descriptor: None
run(folder / "expected")
expected, out = contents(folder / "expected"), folder / "out"
n, failures, status, places = 0, [], None, 0
while status != 0:
    n += every
    shutil.rmtree(out, ignore_errors=True)
    status = fork(lambda: filling(n))
    visible = contents(out)
    places += status != 0
    if status not in (0, 7 << 8):
        failures.append([n, f"not reported as a full disk: {status}"])
    if any(expected.get(name) != data for name, data in visible.items()):
        failures.append([n, "half a file is visible"])
    if "config.json" in visible and visible != expected:
        failures.append([n, "half a model looks finished"])
    if status and fork(lambda: run(out)) and contents(out) != expected:
        failures.append([n, "the same command failed"])
    if contents(out) != expected:
        failures.append([n, "the same command ended differently"])
print(json.dumps({"places": places, "failures": failures}))
"""
)

POWER_CUT_EVERYWHERE = (
    FORKS
    + """
import stat

really_sync = os.fsync
contents_of, names_of, kept = {}, {}, []  # by inode: flushed contents, flushed names; descriptors that keep inodes

def record(descriptor):
    kept.append(os.dup(descriptor))
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        names_of[status.st_ino] = {
            entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(f"/proc/self/fd/{descriptor}")
        }
    else:
        contents_of[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

def restore(inode, target, names):
    target.mkdir()
    for name, (child, is_folder) in names(inode).items():
        if is_folder:
            restore(child, target / name, names)
        else:
            (target / name).write_bytes(contents_of.get(child, b""))

def cut(n, act, disk, all_names):
    passed = 0
    def flushed(descriptor):
        nonlocal passed
        passed += 1
        if passed == n:
            places = {path.stat().st_ino: path for path in [disk, *disk.rglob("*")] if path.is_dir()}
            def live(inode):
                return {e.name: (e.inode(), e.is_dir()) for e in os.scandir(places[inode])} if inode in places else {}
            flushed_names = lambda inode: names_of.get(inode, {})
            restore(disk.stat().st_ino, folder / "after", live if all_names else flushed_names)
            os._exit(99)
        record(descriptor)
    os.fsync = flushed
    act()

def flush_root(disk):
    descriptor = os.open(disk, os.O_RDONLY)
    record(descriptor)
    os.close(descriptor)

os.fsync = lambda descriptor: None
run(folder / "expected")
expected = contents(folder / "expected")
disk, failures, places = folder / "disk", [], 0
for all_names in (False, True):
    n, status = 0, None
    while status != 0:
        n += every
        for name in ("disk", "after"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (disk / "out").mkdir(parents=True)
        flush_root(disk)
        status = fork(lambda: cut(n, lambda: run(disk / "out"), disk, all_names))
        if status == 0:
            break
        places += 1
        out = folder / "after" / "out"
        visible = contents(out)
        if "config.json" in visible and visible["config.json"] and visible != expected:
            failures.append([n, all_names, "half a model looks finished"])
        if fork(lambda: run(out)) and contents(out) != expected:
            failures.append([n, all_names, "the same command failed"])
        if contents(out) != expected:
            failures.append([n, all_names, "the same command ended differently"])
print(json.dumps({"places": places, "failures": failures}))
"""
)


@posix
def test_full_disk_at_any_write_is_reported_and_costs_nothing(tmp_path: Path) -> None:
    result = in_a_process(source_model(tmp_path), f"every = {EVERY}" + FULL_DISK_EVERYWHERE, SECONDS)
    assert result["failures"] == []
    assert result["places"] > 90 // EVERY


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_power_cut_at_any_flush_costs_at_most_the_last_block(tmp_path: Path) -> None:
    result = in_a_process(source_model(tmp_path), f"every = {EVERY}" + POWER_CUT_EVERYWHERE, SECONDS)
    assert result["failures"] == []
    assert result["places"] > 90 // EVERY
