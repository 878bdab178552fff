"""The machine, its software, and the two ceilings that all results are compared with.

The ceilings are measured: bytes per second of a copy within the device's memory (read plus written), and operations per
second of a large bf16 matrix product of random data.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import partial

import torch

from bench.plan import Plan
from bench.results import ROOT, sources
from bench.session import Result, Session
from bench.timing import events
from llmq_kernels import backend

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "gemlite", "torchao")
REPEATS = 20


def measure(plan: Plan, session: Session) -> None:
    """Cases: machine, copy, matmul."""
    device = torch.device(plan.device)
    session.run("machine", partial(machine, device))
    session.run("copy", partial(copy_bandwidth, device, plan.copy_bytes))
    session.run("matmul", partial(matmul_rate, device, plan.matmul_size))


def machine(device: torch.device) -> Result:
    """Names and versions."""
    about: Result = {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
        "sources": sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": l2_bytes(device),
            "memory_bytes": properties.total_memory,
        }
        for field in ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"):
            about[field] = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0")
    else:
        about |= {"name": f"{platform.machine()} cpu, interpreter", "cores": os.cpu_count(), "l2_bytes": 0}
    choice = backend.choose(device)
    about |= {"backend": choice.name, "reason": choice.reason}
    about["wrong"] = device.type == "cuda" and choice.name != "triton"  # all other sections would measure torch
    return {**about, "summary": f"{about['name']}, torch {torch.__version__}, sources {about['sources']}"}


def copy_bandwidth(device: torch.device, nbytes: int) -> Result:
    """Bytes per second, read plus written."""
    source = torch.randint(0, 127, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spread = events(lambda: target.copy_(source), repeats=REPEATS, device=device)
    rate = 2 * nbytes / spread.median
    return {"bytes_per_second": rate, **spread.microseconds(), "summary": f"{rate / 1e12:.2f} TB/s"}


def matmul_rate(device: torch.device, size: int) -> Result:
    """Operations per second of a square bf16 product."""
    x, w = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    spread = events(lambda: torch.mm(x, w), repeats=REPEATS, device=device)
    rate = 2 * size**3 / spread.median
    return {"operations_per_second": rate, **spread.microseconds(), "summary": f"{rate / 1e12:.0f} TFLOP/s"}


def l2_bytes(device: torch.device) -> int:
    """The L2 cache of a GPU; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a program prints; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
