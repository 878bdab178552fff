"""How much memory is free where a model computes, and the sizes by which passes over a model plan theirs.

In a container or a batch system that is less than the machine has, and psutil does not say so: a process that takes
more than its control group is allowed is killed without a word.
"""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Copies of one block's weights in float32 that are in memory at once.
BLOCK_COPIES_TO_EVALUATE = 2  # the block as it is read, and what it makes of a batch
BLOCK_COPIES_TO_QUANTIZE = 3  # its weights as they are loaded, rounded and compared; also to measure layers
BLOCK_COPIES_TO_TUNE = 4  # its weights, their gradients, and one weight's state while it is changed

# Tokens that go through a block together.  They decide in which order floats are summed, so results depend on them in
# the last bits, and none of them depends on what is free.
TOKENS_PER_BATCH_TO_EVALUATE = 2048
TOKENS_PER_BATCH_TO_WEIGH = 4096  # for token weights, with the block's graph
TOKENS_PER_BATCH_TO_QUANTIZE = {"cpu": 4096, "cuda": 32_768}  # by device type

PROBE_TOKENS = 64  # they show which weights share an input, and what makes it; a layer that sees none stays in float

HOST = torch.device("cpu")
AMPLE_BYTES = 2**30  # of free memory; with less, nothing is read ahead, and nothing written while other work goes on
CGROUPS = Path("/sys/fs/cgroup")
# Below the mount point: the limit, what is used of it, and how the statistics call file pages that would be given up.
VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def spare(device: torch.device) -> int:
    """Bytes that are free where `device` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    return max(0, min(available, *_left_of_address_space(), *left_of_groups(CGROUPS)))


def _left_of_address_space() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(psutil.Process().memory_info().vms)


def left_of_groups(mounted: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group above this process, mounted at `mounted`, still has; nothing where none is limited.

    `membership` has a line `number:controllers:path` for each hierarchy; within a container the path may be the host's,
    and the group is at the mount point.
    """
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for below, limit, usage, reclaimable in VERSIONS:
        paths = [path for _, controllers, path in (line.split(":", 2) for line in lines) if controllers == below]
        root = mounted / below
        own = [root / path.lstrip("/") for path in paths]
        folders = dict.fromkeys([root, *(folder for each in own for folder in (each, *each.parents))])
        for folder in folders:
            if folder.is_relative_to(root) and (folder / limit).is_file() and (folder / usage).is_file():
                allowed = (folder / limit).read_text(encoding="utf-8").strip()
                if allowed != "max":
                    yield (
                        int(allowed)
                        - int((folder / usage).read_text(encoding="utf-8"))
                        + _inactive(folder, reclaimable)
                    )


def _inactive(folder: Path, name: str) -> int:
    statistics = folder / "memory.stat"
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
