"""`llmq env`"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.cli import options
from llmq.cli.terminal import megabytes, print_json, print_table

if TYPE_CHECKING:
    from llmq.runtime.environment import Device, Environment

PANEL, ORDER = "Run", 2


def command(json: options.Json = False) -> None:
    """Show versions and devices, and which kernels each device gets, and why.

    LLMQ_BACKEND=torch keeps the Triton kernels off; auto, the default, uses them where they work.
    """
    from llmq.runtime.environment import environment

    found = environment()
    if json:
        print_json(found.to_dict())
    else:
        print_environment(found)


def print_environment(found: "Environment") -> None:
    """The same as tables."""
    versions = [("llmq", found.llmq), ("python", found.python)]
    versions += [(name, version or "not installed") for name, version in found.packages.items()]
    versions += [("CUDA of torch", found.cuda_runtime or "none"), ("CUDA of the driver", found.cuda_driver or "none")]
    versions += [("system", found.system), *found.variables.items()]
    print_table("versions", ("", "value"), versions)
    rows = [(device.name, device.description, *_figures(device), device.backend, device.reason)
            for device in found.devices]  # fmt: skip
    columns = ("device", "name", "compute capability", "multiprocessors", "memory", "backend", "because")
    print_table("devices", columns, rows)
    cpu = [("threads", str(found.cpu_threads)), ("instructions", found.cpu_instructions),
           ("few rows", found.cpu_small_products)]  # fmt: skip
    print_table("CPU", ("", "value"), cpu)
    for device in found.devices:
        if device.tiles is not None:
            print_table(f"W4A16 kernel on {device.name}", ("", "value"), _tiles(device))


def _figures(device: "Device") -> tuple[str, str, str]:
    memory = "-" if device.memory is None else megabytes(device.memory)
    return device.capability or "-", str(device.processors or "-"), memory


def _tiles(device: "Device") -> Iterator[tuple[str, str]]:
    if isinstance(device.tiles, str):
        yield "no table", device.tiles
    elif device.tiles is not None:
        yield "table", f"{device.tiles.source}, for architecture {device.tiles.architecture}"
        yield from ((f"up to {rows} rows", tile) for rows, tile in device.tiles.rows.items())
        yield f"above {device.tiles.crossover} rows", "dequantised, then cuBLAS"
