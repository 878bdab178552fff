"""Which backend runs an op on a device, and why.

`triton` where a CUDA device has a working Triton, else `torch`.  The environment variable LLMQ_BACKEND (auto, triton,
torch) overrides.  One tiny launch per device tests whether Triton works; if it is missing or broken, `torch` is used
with one warning, so that a model still runs.  Nothing here happens at import.

The launch waits for its result, which is not allowed while a CUDA graph is captured: run a model once before capturing
it, as torch requires anyway.
"""

import functools
import os
import warnings
from dataclasses import dataclass

import torch

from llmq_kernels.errors import KernelWarning

VARIABLE = "LLMQ_BACKEND"
NAMES = ("auto", "triton", "torch")
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """`name` is "triton" or "torch"; `reason` explains it to a person."""

    name: str
    reason: str


def choose(device: torch.device) -> Choice:
    """The backend for ops on `device`.  Never raises; warns once if the setting cannot be used."""
    setting = os.environ.get(VARIABLE) or "auto"
    if setting not in NAMES:
        _warn_once(f"{VARIABLE}={setting!r} is not one of {', '.join(NAMES)}; auto is used")
    if setting == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    if device.type != "cuda":
        reason = f"Triton kernels need a CUDA device, this is {device.type}"
        if setting == "triton":
            _warn_once(f"{VARIABLE}=triton: {reason}; torch is used")
        return Choice("torch", reason)
    try:
        return _probed(device)
    except _CapturingError:
        return Choice("torch", "a CUDA graph is being captured, and Triton was not tested before")


class _CapturingError(Exception):
    """Nothing can be tested during a capture, and the result must not be cached."""


@functools.cache
def _probed(device: torch.device) -> Choice:
    """The backend for a CUDA device, by a test launch; raises _CapturingError while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise _CapturingError
    try:
        from llmq_kernels import triton_probe

        if torch.version.hip is not None:
            return Choice("torch", "the kernels contain NVIDIA instructions, this is an AMD device")
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= LEAST_CAPABILITY:
            triton_probe.run(device)
    except Exception as error:  # a missing package, a missing compiler, a driver too old: each fails differently
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        problem = f"{type(error).__name__}: {first}"
        _warn_once(f"Triton does not work here, the slower torch backend is used: {problem}")
        return Choice("torch", problem)
    if (major, minor) < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        return Choice("torch", f"compute capability {major}.{minor}, the kernels need {needed}")
    return Choice("triton", f"compute capability {major}.{minor}")


@functools.cache
def _warn_once(message: str) -> None:
    """Once per message, for any number of devices and calls."""
    warnings.warn(message, KernelWarning, stacklevel=3)
