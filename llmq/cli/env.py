"""`llmq env`"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.terminal import print_json, print_table
from llmq.report.shown import megabytes

if TYPE_CHECKING:
    from llmq.runtime.environment import Device, Environment

PANEL, ORDER = "Run", 2


def command(quiet: options.Quiet = False, json: options.Json = False) -> None:
    """Show versions, devices and the kernels that each device uses.

    LLMQ_BACKEND=torch turns the Triton kernels off; auto, the default, uses
    them if they work.

    Examples:
      llmq env
      llmq env --json

    Exit codes:
      0  success

    See also:
      llmq bench  speed of a model on these devices
    """
    begin(quiet=quiet)
    from llmq.runtime.environment import environment

    present = environment()
    if json:
        print_json(present.to_dict())
    else:
        print_environment(present)


def print_environment(info: "Environment") -> None:
    """Print versions and devices as tables."""
    versions = [("llmq", info.llmq), ("python", info.python)]
    versions += [(name, version or "not installed") for name, version in info.packages.items()]
    versions += [("CUDA of torch", info.cuda_runtime or "none"), ("CUDA of the driver", info.cuda_driver or "none")]
    versions += [("system", info.system), *info.variables.items()]
    print_table("versions", ("", "value"), versions)
    rows = [(device.name, device.description, *_figures(device), device.backend, device.reason)
            for device in info.devices]  # fmt: skip
    columns = ("device", "name", "compute capability", "multiprocessors", "memory", "backend", "reason")
    print_table("devices", columns, rows)
    cpu = [("threads", str(info.cpu_threads)), ("instructions", info.cpu_instructions),
           ("small batches", info.cpu_small_products)]  # fmt: skip
    print_table("CPU", ("", "value"), cpu)
    for device in info.devices:
        if device.tiles is not None:
            print_table(f"W4A16 kernel on {device.name}", ("", "value"), _tiles(device))


def _figures(device: "Device") -> tuple[str, str, str]:
    memory = "-" if device.memory is None else megabytes(device.memory)
    return device.capability or "-", str(device.processors or "-"), memory


def _tiles(device: "Device") -> Iterator[tuple[str, str]]:
    if isinstance(device.tiles, str):
        yield "invalid table", device.tiles
    elif device.tiles is not None:
        yield "table", f"{device.tiles.source}, for architecture {device.tiles.architecture}"
        yield from ((f"up to {rows} rows", tile) for rows, tile in device.tiles.rows.items())
        yield f"above {device.tiles.crossover} rows", "dequantized, then cuBLAS"
