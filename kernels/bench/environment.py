"""The machine, its software, the two ceilings that all results are compared with, and what limits the main kernel.

The ceilings are measured: bytes per second of a copy within the device's memory (read plus written), and operations per
second of a large bf16 matrix product of random data.
"""

import csv
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from functools import partial

import torch

from bench.plan import Plan
from bench.results import ROOT, sources
from bench.session import Result, Session
from bench.timing import events
from llmq_kernels import backend

NEEDED = ("transformers", "safetensors", "numpy", "psutil", "accelerate", "datasets", "gguf", "huggingface_hub", "rich",
          "typer", "pydantic", "tomli_w")  # fmt: skip
COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
PROFILER, PROFILER_SECONDS = "ncu", 30.0
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "gemlite", "torchao")
REPEATS = 20


def measure(plan: Plan, session: Session) -> None:
    """Cases: machine, copy, matmul, counters."""
    device = torch.device(plan.device)
    session.run("machine", partial(machine, device))
    session.run("copy", partial(copy_bandwidth, device, plan.copy_bytes))
    session.run("matmul", partial(matmul_rate, device, plan.matmul_size))
    session.run("counters", partial(hardware_counters, plan))


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
    about["missing"] = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    about["wrong"] = device.type == "cuda" and choice.name != "triton"  # all other sections would measure torch
    missing = f", MISSING: {', '.join(about['missing'])}" if about["missing"] else ""
    return {**about, "summary": f"{about['name']}, torch {torch.__version__}, sources {about['sources']}{missing}"}


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


def hardware_counters(plan: Plan) -> Result:
    """How busy issue slots and memory are in one launch of the product for one row, by NVIDIA's profiler."""
    if plan.device != "cuda" or shutil.which(PROFILER) is None:
        return {"available": False, "summary": f"{PROFILER} is not installed"}
    command = [PROFILER, "--kernel-name", "regex:fused4", "--launch-skip", "2", "--launch-count", "1"]
    command += ["--clock-control", "none", "--metrics", ",".join(COUNTERS.values()), "--csv", "--page", "raw"]
    command += [sys.executable, "-m", "bench.one_launch"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PROFILER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"available": False, "summary": "not finished in time"}
    values = read_counters(done.stdout)
    if not values:
        text = " ".join((done.stdout + done.stderr).split())
        return {"available": False, "summary": f"no counters: {text[-200:]}"}
    shown = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
    return {"available": True, **values, "summary": shown}


def read_counters(text: str) -> dict[str, float]:
    """The values of COUNTERS in the profiler's table: a row of names, one of units, one per launch."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return {}
    by_name = dict(zip(rows[0], rows[-1], strict=False))
    units = dict(zip(rows[0], rows[1], strict=False))
    values = {name: float(by_name[key].replace(",", "")) for name, key in COUNTERS.items() if by_name.get(key)}
    if units.get(COUNTERS["microseconds"], "").startswith("n"):  # nanoseconds
        values["microseconds"] /= 1000
    return values


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
