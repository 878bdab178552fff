"""The disk and the bus: what reading a checkpoint and writing the result cost next to the GPU.

Files are written with fsync, as the writer of a run does, and read back once; the page cache may serve part of the
reads, which the record states as it is.  Copies to and from the device use pageable and pinned memory.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.plan import Plan
from bench.session import Result, Session
from bench.timing import now, seconds_of

PIECE = 1 << 28  # bytes per write, about a block of an 8B model
REPEATS = 3


def measure(plan: Plan, session: Session) -> None:
    """Cases: write and read, pageable and pinned to and from the device."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("write and read", partial(write_and_read, Path(folder) / "file", plan.disk_bytes))
    for pinned in (False, True) if plan.device == "cuda" else ():
        name = "pinned" if pinned else "pageable"
        session.run(f"{name} copies", partial(copies, min(PIECE, plan.disk_bytes), pinned))


def write_and_read(path: Path, nbytes: int) -> Result:
    """Bytes per second of a file of `nbytes` of random data."""
    cpu = torch.device("cpu")
    piece = torch.randint(0, 255, (min(PIECE, nbytes),), dtype=torch.uint8)
    pieces = max(1, nbytes // len(piece))
    start = now(cpu)
    with path.open("wb", buffering=0) as file:
        for _ in range(pieces):
            file.write(memoryview(piece.numpy()))
        os.fsync(file.fileno())
    written = now(cpu) - start
    start = now(cpu)
    with path.open("rb", buffering=0) as file:
        while file.readinto(memoryview(piece.numpy())):
            pass
    read = now(cpu) - start
    total = pieces * len(piece)
    rates = {"written_per_second": total / written, "read_per_second": total / read}
    shown = ", ".join(f"{name.split('_')[0]} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    return {"bytes": total, **rates, "summary": shown}


def copies(nbytes: int, pinned: bool) -> Result:
    """Bytes per second to and from the device."""
    device = torch.device("cuda")
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    rates = {
        "to_device_per_second": nbytes / fastest(lambda: there.copy_(host, non_blocking=True), device),
        "from_device_per_second": nbytes / fastest(lambda: host.copy_(there, non_blocking=True), device),
    }
    shown = ", ".join(f"{rate / 1e9:.1f} GB/s" for rate in rates.values())
    return {"bytes": nbytes, "pinned": pinned, **rates, "summary": f"to and from the device {shown}"}


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of REPEATS runs, after one that is not timed."""
    return min(seconds_of(work, repeats=REPEATS, device=device))
