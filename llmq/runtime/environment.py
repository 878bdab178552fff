"""The environment: versions, devices, and the kernels of each device with the reason."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmq._version import __version__
from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import configs, int8_inputs, small_batches

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "pydantic")
VARIABLES = (backend.VARIABLE, configs.VARIABLE, small_batches.VARIABLE)


def versions() -> dict[str, str]:
    """What a run records about the software and the system."""
    return {
        "llmq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@dataclass(frozen=True)
class Tiles:
    """The default configuration of the W4A16 kernel on a device, for shapes without a separate entry.

    source        the file of the table
    architecture  compute capability of the device, major * 10 + minor
    rows          maximum number of rows of activations -> tile, warps and stages
    """

    source: str
    architecture: int
    rows: Mapping[int, str]
    crossover: int


@dataclass(frozen=True)
class Device:
    """A device and its backend with the reason. Memory in bytes. `tiles` is None if Triton kernels are not used."""

    name: str
    description: str
    backend: str
    reason: str
    capability: str | None = None
    memory: int | None = None
    processors: int | None = None
    tiles: Tiles | str | None = None  # a text is the error of an invalid table


@dataclass(frozen=True)
class Environment:
    """Versions by package, None if not installed; CUDA versions; environment variables that are set; devices."""

    llmq: str
    python: str
    system: str
    packages: Mapping[str, str | None]
    cuda_runtime: str | None
    cuda_driver: str | None
    variables: Mapping[str, str]
    cpu_threads: int
    cpu_instructions: str
    cpu_small_products: str
    devices: tuple[Device, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def environment() -> Environment:
    """Inspect the environment: launches one tiny kernel on GPUs, and times a product for some milliseconds on CPUs."""
    present = torch.cuda.is_available()
    return Environment(
        llmq=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        cuda_runtime=torch.version.cuda,
        cuda_driver=_driver() if present else None,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        cpu_threads=torch.get_num_threads(),
        cpu_instructions=torch.backends.cpu.get_cpu_capability(),
        cpu_small_products="; ".join([*map(small_batches.describe, small_batches.PRODUCTS), int8_inputs.describe()]),
        devices=(_cpu(), *(_gpu(index) for index in range(torch.cuda.device_count() if present else 0))),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The newest CUDA version that the driver supports, such as 12.4 for 12040; None if unknown."""
    number = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _cpu() -> Device:
    choice = backend.choose(torch.device("cpu"))
    return Device("cpu", platform.processor() or platform.machine(), choice.name, choice.reason)


def _gpu(index: int) -> Device:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    choice = backend.choose(device)
    architecture = properties.major * 10 + properties.minor
    return Device(
        name=str(device),
        description=properties.name,
        backend=choice.name,
        reason=choice.reason,
        capability=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory,
        processors=properties.multi_processor_count,
        tiles=tiles(architecture) if choice.name == "triton" else None,
    )


def tiles(architecture: int) -> Tiles | str:
    """The table of an architecture, or the error in the file that the user named for it."""
    named = os.environ.get(configs.VARIABLE)
    try:
        table = configs.for_architecture(architecture)
        own = bool(named) and architecture in configs.read(Path(str(named)).read_text(encoding="utf-8"), str(named))
    except (KernelInputError, OSError) as error:
        return str(error)
    rows = {choice.max_rows: _tile(choice.config) for choice in table.default}
    return Tiles(str(named) if own else "shipped with llmq", architecture, rows, table.crossover)


def _tile(config: configs.Config) -> str:
    return f"{config.block_m} x {config.block_n}, {config.warps} warps, {config.stages} stages"
