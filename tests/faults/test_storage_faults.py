"""Full disks, kills, damaged files and small memory limits: finished blocks are kept, incomplete models are hidden.

The faults are real (resource limits, SIGKILL), so they happen in separate processes.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import read_header, read_tensor
from llmq.checkpoint.writer import Writer
from llmq.errors import CheckpointError
from tests.faults.toy_run import FORKS, in_a_process, source_model

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits and signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return source_model(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


FULL_DISK = """
writer = open_writer(folder / "out")
writer.commit(0, block(0), {})
writer.settle()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
errors = []
try:
    writer.commit(1, block(1, values=4096), {})  # 16 kB
    writer.settle()
except LlmqError as error:
    errors.append([type(error).__name__, error.exit_code, str(error), error.hint])
staged = sorted(path.name for path in (folder / "out" / ".llmq-partial").iterdir())
try:
    with writer.finishing() as final:
        writer.assemble(final, [], {}, {"config.json": "x" * 10_000})
except LlmqError as error:
    errors.append([type(error).__name__, error.exit_code, str(error), error.hint])
print(json.dumps({"errors": errors, "has": [writer.has(0), writer.has(1)], "staged": staged}))
"""


@posix
def test_file_size_limit_loses_only_the_file_being_written(folder: Path) -> None:
    result = in_a_process(folder, FULL_DISK)
    for kind, exit_code, message, hint in result["errors"]:
        assert (kind, exit_code) == ("StorageError", 7)
        assert "File too large" in message
        assert "ulimit" in hint
        assert "repeat the command" in hint
    assert ["00001.safetensors" in result["errors"][0][2], "config.json" in result["errors"][1][2]] == [True, True]
    assert result["has"] == [True, False]
    assert result["staged"] == ["00000.json", "00000.safetensors", "identity.json"]
    writer = Writer.open(folder / "out", identity={"run": 1}, overwrite=False, needed_bytes=0)
    assert writer.resumed_blocks == 1
    assert writer.read(0)[0]["layers.0.weight"].equal(torch.zeros(1024))


# Kill a run at its n-th system call, for every n: before the call and, by the next n, after it.  Each run is a fork of
# a process with torch loaded, and is killed with SIGKILL; the same command must then finish with the expected files.
KILL_EVERYWHERE = (
    FORKS
    + """
def killing(n, act):
    calls = 0
    def counted(call):
        def wrapper(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return wrapper
    os.fsync = counted(os.fsync)
    for name in ("replace", "rename", "unlink", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)  # rmtree calls these
    act()

os.fsync = lambda descriptor: None  # a kill, unlike a power cut, does not lose written data: save the time
overwrite = OVERWRITE
old = {"config.json": b"{}", "model.safetensors": b"old", "card.md": b"old", "mine.txt": b"mine"} if overwrite else {}

def prepare(out):
    shutil.rmtree(out, ignore_errors=True)
    if overwrite:
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)

prepare(folder / "expected")
run(folder / "expected", overwrite)
expected = contents(folder / "expected")
out = folder / "out"
n, failures, seen, done = 0, [], set(), False
while not done:
    n += 1
    prepare(out)
    status = fork(lambda: killing(n, lambda: run(out, overwrite)))
    done = status == 0  # the run ended before its n-th call
    visible = contents(out)
    if any(data not in (old.get(name), expected.get(name)) for name, data in visible.items()):
        failures.append([n, "half a file is visible"])
    if visible.get("config.json") == expected["config.json"] and visible != expected:
        failures.append([n, "half a model looks finished"])
    if overwrite and visible.get("config.json") == old["config.json"] and visible != old:
        failures.append([n, "half of the old model looks finished"])
    staging = out / ".llmq-partial"
    seen.add(len(list(staging.glob("0*.json"))) if staging.exists() else "no staging")
    if not done:
        refused = fork(lambda: run(out, overwrite)) != 0
        if refused and visible != expected:  # refusing a finished model is correct, even with leftover files next to it
            failures.append([n, "the same command failed"])
        if contents(out) != expected or (staging.exists() and not refused):
            failures.append([n, "the same command ended differently"])
print(json.dumps({"kills": n - 1, "failures": failures, "seen": sorted(map(str, seen)), "expected": sorted(expected)}))
"""
)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_run_can_be_repeated_after_any_system_call(overwrite: bool, folder: Path) -> None:
    result = in_a_process(folder, KILL_EVERYWHERE.replace("OVERWRITE", str(overwrite)))
    assert result["failures"] == []
    assert result["kills"] > 50  # three files per block and five at the end, each with its fsyncs and renames
    assert result["seen"] == ["0", "1", "2", "3", "no staging"]
    model = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    mine = {"mine.txt"} if overwrite else set()
    assert set(result["expected"]) == {
        "config.json", "card.md", "tokenizer.json", "model.safetensors.index.json", *model, *mine
    }  # fmt: skip


KILL_BETWEEN_COMMITS = """
child = os.fork()
if child == 0:
    writer = open_writer(folder / "out")
    writer.commit(0, block(0), {"index": 0})
    writer.commit(1, block(1), {"index": 1})
    writer.settle()
    os.kill(os.getpid(), signal.SIGKILL)
signalled = os.waitpid(child, 0)[1]
resumed = open_writer(folder / "out").resumed_blocks
run(folder / "out")
run(folder / "straight")
print(json.dumps({"resumed": resumed, "killed": signalled == signal.SIGKILL}))
"""


@posix
def test_run_killed_between_blocks_resumes_to_the_same_bytes(folder: Path) -> None:
    assert in_a_process(folder, KILL_BETWEEN_COMMITS) == {"resumed": 2, "killed": True}
    assert contents(folder / "out") == contents(folder / "straight")
    assert set(Checkpoint.open(folder / "out").names()) >= {"layers.0.weight", "layers.2.weight", "embed", "head"}


# The file is sparse, so it needs no disk space; it is larger than the address space limit of the process.
SMALL_MEMORY = """
import safetensors, struct
tensor_bytes, allowance = 48 << 20, 128 << 20
in_use = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
count = (in_use + allowance) // tensor_bytes + 1
offsets = [[i * tensor_bytes, (i + 1) * tensor_bytes] for i in range(count)]
header = {f"{i:03d}": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": offsets[i]} for i in range(count)}
header = json.dumps(header).encode()
path = folder / "large.safetensors"
with path.open("wb") as file:
    file.write(struct.pack("<Q", len(header)) + header)
    file.truncate(8 + len(header) + count * tensor_bytes)
    file.seek(-1, 2)
    file.write(b"\\x07")
resource.setrlimit(resource.RLIMIT_AS, (in_use + allowance, resource.RLIM_INFINITY))
try:
    safetensors.safe_open(path, framework="pt")
    mapped = True
except (OSError, MemoryError, safetensors.SafetensorError):
    mapped = False
read = 0
infos = list(read_header(path).values())
for info in [*infos[:: count // 3], infos[-1]]:  # more than the allowance, if they were not freed
    tensor = read_tensor(path, info)
    read += tensor.numel()
    last = int(tensor[-1])
    del tensor
print(json.dumps({"mapped": mapped, "read above allowance": read > allowance, "last": last,
                  "file above limit": path.stat().st_size > in_use + allowance}))
"""


@linux
def test_file_larger_than_address_space_is_read_by_tensor(folder: Path) -> None:
    result = in_a_process(folder, SMALL_MEMORY)
    assert result == {"mapped": False, "read above allowance": True, "last": 7, "file above limit": True}


def test_truncated_shard_is_reported_before_any_work(folder: Path) -> None:
    (folder / "source" / "config.json").write_text("{}")
    shard = folder / "source" / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated: found {size // 2} bytes, expected"):
        Checkpoint.open(folder / "source")


def test_wrong_tensor_offsets_are_refused(folder: Path) -> None:
    (folder / "source" / "config.json").write_text("{}")
    shard = folder / "source" / "model.safetensors"
    honest = shard.read_bytes()
    lying = honest.replace(b"[400,600]", b"[399,600]").replace(b"[0,400]", b"[0,399]")
    assert lying != honest
    shard.write_bytes(lying)
    with pytest.raises(CheckpointError, match="bytes, which does not match F32"):
        Checkpoint.open(folder / "source")


SMALL_FILE = save(
    {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16), "c": torch.zeros(0, dtype=torch.int64)}
)
HEADER_BYTES = 8 + int.from_bytes(SMALL_FILE[:8], "little")


@given(flips=st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_corrupt_header_is_refused_or_still_consistent(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL_FILE)
    for position, mask in flips:
        data[position] ^= mask
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            header = read_header(path)
        except CheckpointError:
            return
        tensors = [read_tensor(path, info) for info in header.values()]
        assert sum(tensor.nbytes for tensor in tensors) == len(SMALL_FILE) - 8 - int.from_bytes(data[:8], "little")
