"""How much memory is free on the compute device, and the sizes that passes over a model plan with.

With little free memory a run becomes slower, with the same result: hidden states move from the device to main memory
and then to files (`model/passes/hidden_states.py`), forwards start again for each group (`model/passes/sequential.py`),
end-to-end tuning reads the packed blocks in each step (`steps/end_to_end/memory_plan.py`), and blocks are neither read
ahead nor written in a thread. One result depends on it: where the state of quantized values does not fit, end-to-end
tuning is left out, and a note reports this.

A run that is out of memory nevertheless continues at the block where it happened, and is more economical from then on
(`within_memory`). No step of this changes a bit of the result, except as docs/RELIABILITY.md states.

In a container or a batch system a process may use less memory than the machine has. psutil does not report this limit,
and a process that exceeds the limit of its control group is killed without a message. So the process limits its own
allocations (`below_group_limit`).
"""

import ctypes
import enum
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from llmq.errors import BackendError

# Copies of one block's weights in float32 that are in memory at the same time.
BLOCK_COPIES_TO_EVALUATE = 2  # the block as it is read, and its activations for one batch
BLOCK_COPIES_TO_QUANTIZE = 3  # its weights as loaded, as quantized, and their difference; also to measure layers

# Tokens that go through a block together. They decide in which order floats are summed, so results depend on them in
# the last bits. They must not depend on the free memory.
TOKENS_PER_BATCH_TO_EVALUATE = 2048
TOKENS_PER_BATCH_TO_WEIGH = 4096  # for token weights, with the block's graph
TOKENS_PER_BATCH_TO_QUANTIZE = {"cpu": 4096, "cuda": 32_768}  # by device type

RETRIED = "out of memory"  # how the notes about another attempt begin
PROBE_TOKENS = 64  # they show which weights share an input, and which layer makes it; layers not run are kept in float

HOST = torch.device("cpu")
AMPLE_BYTES = 2**30  # free memory; with less, nothing is read ahead, and blocks are written without a thread
CGROUPS = Path("/sys/fs/cgroup")
GROUP_RESERVE = 64 * 2**20  # bytes of a control group that stay free: for file pages, and what the C library keeps
# Per version of control groups: the folder below the mount point, the files with the limit and the usage, and the name
# of the reclaimable file pages in memory.stat.
VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def spare(device: torch.device) -> int:
    """Free bytes in the memory of `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch can use it again
        return torch.cuda.mem_get_info(device)[0] + cached
    shared = min([int(psutil.virtual_memory().available), *left_of_groups(CGROUPS)])
    return max(0, min([shared // processes(os.environ), *_left_of_address_space()]))


def give_back() -> None:
    """Return memory that was freed to the system, where the C library keeps it for later: on Linux, glibc.

    It keeps freed tensors of up to 32 MB, and new tensors do not fit into the gaps between those still in use, so
    the memory of a process would grow with every block.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, or None with another C library."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def peak(device: torch.device) -> int:
    """The peak memory of this process on a GPU so far, in bytes; 0 for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def total(device: torch.device) -> int:
    """Bytes of the memory of `device`, or those of main memory that this process may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [limit for limit, _ in groups_with_limit(CGROUPS)]
    return min(int(psutil.virtual_memory().total), *limits) if limits else int(psutil.virtual_memory().total)


def processes(environment: Mapping[str, str]) -> int:
    """The number of processes of a run that share the memory of this machine, as torchrun and accelerate set it."""
    return max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))


def _left_of_address_space() -> Iterator[int]:
    process = psutil.Process()
    if hasattr(psutil, "RLIMIT_AS"):  # not on Windows, nor on macOS, which ignores the limit
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            yield limit - int(process.memory_info().vms)


def left_of_groups(mounted: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Free bytes of each control group of this process that has a limit; see `groups_with_limit`."""
    for limit, used in groups_with_limit(mounted, membership):
        yield limit - used


def groups_with_limit(mounted: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """The limit and the used bytes of each control group of this process; the groups are mounted at `mounted`.

    `membership` has a line `number:controllers:path` per hierarchy. In a container the path may be that of the host,
    while the group is at the mount point.
    """
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for below, limit, usage, reclaimable in VERSIONS:
        paths = [path for _, controllers, path in (line.split(":", 2) for line in lines) if controllers == below]
        root = mounted / below
        groups = [root / path.lstrip("/") for path in paths]
        folders = dict.fromkeys([root, *(folder for group in groups for folder in (group, *group.parents))])
        for folder in folders:
            if folder.is_relative_to(root) and (folder / limit).is_file() and (folder / usage).is_file():
                allowed = (folder / limit).read_text(encoding="utf-8").strip()
                if allowed != "max":
                    used = int((folder / usage).read_text(encoding="utf-8")) - _inactive(folder, reclaimable)
                    yield int(allowed), used


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """While open, `gc.collect` searches only what was made since; all of torch and transformers takes 0.25 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def below_group_limit(device: torch.device, mounted: Path = CGROUPS) -> Iterator[None]:
    """While open, allocations of this process fail shortly before the limit of its control group.

    The limit is that of private data (RLIMIT_DATA of Linux), which also counts pages that are not in use yet, or not
    any more; so it starts from those in use. It is not set for a run on a GPU, whose driver reserves address space in
    ways that were not tried.
    """
    left = [free for free in left_of_groups(mounted) if free < psutil.virtual_memory().total]
    if device.type != "cpu" or not left or not hasattr(psutil, "RLIMIT_DATA"):
        yield
        return
    process = psutil.Process()
    before, highest = process.rlimit(psutil.RLIMIT_DATA)
    own = max(0, min(left) - GROUP_RESERVE) // processes(os.environ)
    resident = process.memory_info().rss - process.memory_info().shared
    limits = [limit for limit in (before, highest) if limit != psutil.RLIM_INFINITY]
    process.rlimit(psutil.RLIMIT_DATA, (min([resident + own, *limits]), highest))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_DATA, (before, highest))


def _inactive(folder: Path, name: str) -> int:
    statistics = folder / "memory.stat"
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


class Economy(enum.IntEnum):
    """What a run does to need less memory; each step includes the earlier ones."""

    NONE = 0
    HALF_BATCHES = 1
    STATES_IN_MAIN_MEMORY = 2
    STATES_IN_FILES = 3

    @property
    def effect(self) -> str:
        """What the run does from this step on, for a note."""
        return (
            "",
            "with half the tokens at a time (all for experts), and without keeping activations",
            "with hidden states in main memory",
            "with hidden states in files",
        )[self]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python or NumPy, in torch on a CPU, or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)


OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA calls outside of torch's allocator
    "ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER
    "could not create a memory",  # oneDNN
)


class Attempts:
    """Attempts at a run on a device, each with less memory than the one before, until one is not out of memory.

        for economy in attempts:
            with attempts.within_memory():
                …

    An attempt must continue after the work that is finished. `report` gets a note for each further one. `together` is
    called with the error: it makes sure that all processes try again, and returns whether they can.
    """

    def __init__(
        self,
        device: torch.device,
        report: Callable[[str], None],
        together: Callable[[BaseException], bool] = lambda error: True,
    ) -> None:
        self._device, self._report, self._together = device, report, together
        self._steps = [step for step in Economy if device.type != "cpu" or step is not Economy.STATES_IN_MAIN_MEMORY]
        self._failed = False  # whether the last attempt was out of memory

    def __iter__(self) -> Iterator[Economy]:
        while True:
            self._failed = False
            yield self._steps[0]
            if not self._failed:
                return
            gc.collect()  # the traceback held the tensors of the failed attempt
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def within_memory(self) -> Iterator[None]:
        """Take the next step if memory runs out here. Raises BackendError if there is none."""
        try:
            with below_group_limit(self._device):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not self._together(error) or len(self._steps) == 1:
                tried = ", although hidden states are kept in files" if len(self._steps) == 1 else ""
                raise BackendError(
                    f"out of memory{tried}: {reason}",
                    hint="free some memory, or use shorter sequences (--seqlen); finished blocks are kept",
                ) from error
            self._failed = True
            del self._steps[0]
            self._report(f"{RETRIED} ({reason}): continued after the last finished block, {self._steps[0].effect}")
