"""Which backend runs an op on a device, and why.

`triton` where a CUDA device has a working Triton, else `torch`.  The environment variable LLMQ_BACKEND (auto, triton,
torch) overrides.  A missing or broken Triton is found out by one tiny launch, once for each device; it falls back to
`torch` with one warning, so that a model still runs.  Nothing here happens at import.
"""

import functools
import os
import warnings
from dataclasses import dataclass

import torch

VARIABLE = "LLMQ_BACKEND"
NAMES = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Choice:
    """`name` is "triton" or "torch"; `reason` is half a sentence for a person."""

    name: str
    reason: str


def choose(device: torch.device) -> Choice:
    """The backend for ops on `device`.  Never raises; warns once where Triton was to be had and does not work."""
    return _choose(device, os.environ.get(VARIABLE, "auto"))


@functools.cache
def _choose(device: torch.device, asked: str) -> Choice:
    if asked not in NAMES:
        warnings.warn(f"{VARIABLE}={asked!r} is not one of {', '.join(NAMES)}; auto is used", stacklevel=3)
    if asked == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    if device.type != "cuda":
        reason = f"Triton kernels need a CUDA device, this is {device.type}"
        if asked == "triton":
            warnings.warn(f"{VARIABLE}=triton: {reason}; torch is used", stacklevel=3)
        return Choice("torch", reason)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Choice("torch", f"compute capability {capability[0]}.{capability[1]}, the kernels need 8.0")
    problem = _why_triton_fails(device)
    if problem is None:
        return Choice("triton", f"compute capability {capability[0]}.{capability[1]}")
    warnings.warn(f"Triton does not work here, the slower torch backend is used: {problem}", stacklevel=3)
    return Choice("torch", problem)


def _why_triton_fails(device: torch.device) -> str | None:
    """None where Triton compiles and runs a kernel on `device`; else the first line of what it said."""
    try:
        from llmq_kernels import triton_probe

        triton_probe.run(device)
    except Exception as error:  # a missing package, a missing compiler, a driver too old: each fails in its own way
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        return f"{type(error).__name__}: {first}"
    return None
