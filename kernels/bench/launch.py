"""The time before the launch of one eager product on a GPU: a decoding step pays it 128 times per token.

    PYTHONPATH=.:kernels python -m bench.launch        needs Triton, and no GPU

The kernels are compiled for compute capability 9.0, but the launch itself does nothing: a stand-in takes the place of
CUDA's driver, and tensors are on the CPU, whose allocator takes about as long as PyTorch's for a GPU.  Everything else
is what runs on a GPU.  The ratio of two ways in one run is the result; the microseconds depend on the machine.

dispatcher   `torch.ops.llmq.w4a16_linear`, which checks, plans and lets Triton find the compiled kernel
no layer     `op.linear` without the `launches` of a layer: no dispatcher
layer        `op.linear` with them
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.w4a16 import configs, counters, gpu, layout, op
from llmq_kernels.w4a16.launches import Launches
from llmq_kernels.w4a16.packed_weight import PackedWeight

ARCHITECTURE, PROCESSORS = 90, 132
N, K, GROUP = 6144, 4096, 128  # of which only shapes matter
CALLS, ROUNDS = 200, 15
SHARED_BYTES = 232448


class Launcher:
    """Takes the arguments of a launch, and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


def driver() -> Any:
    """What Triton asks of CUDA's driver between a call and its launch."""
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES},
    )
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
        launcher_cls=Launcher,
        utils=utils,
    )


@contextmanager
def pretended_gpu() -> Iterator[Any]:
    """Inside, CPU tensors take the way of CUDA tensors up to the launch; yields a function that calls a layer.

    Needs a separate process, because afterwards the op and Triton are still set up for the stand-in.
    """
    from triton.runtime import driver as active

    machine = gpu.Machine(configs.shipped()[ARCHITECTURE], PROCESSORS, assembly=True)
    counts = torch.zeros(counters.PER_STREAM, dtype=torch.int32)
    choose = backend.choose
    layers: list[Launches | None] = [None]

    def chosen(device: torch.device) -> backend.Choice:
        choose(device)  # takes as long as on a GPU
        return backend.Choice("triton", "pretended")

    def on_torch(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
        return op._eagerly_on_gpu(x, weight, bias, layers[0])

    def call(launches: Launches | None, x: Tensor, weight: PackedWeight[Tensor]) -> Tensor:
        layers[0] = launches
        return op.linear(x, weight, None, launches)

    op.w4a16_linear.register_kernel("cpu")(op._on_gpu)
    active.set_active(driver())  # for the rest of the process: Triton cannot return to a driver that is missing
    with (
        mock.patch.object(gpu, "machine_of", lambda _: machine),
        mock.patch.object(backend, "choose", chosen),
        mock.patch.object(counters, "zeroed", lambda *_: counts),
        mock.patch.object(counters, "current_stream", lambda _: 0),
        mock.patch.object(op, "_on_torch", on_torch),
    ):
        yield call


def ways(call: Callable[..., Tensor], rows: int) -> dict[str, Callable[[], Tensor]]:
    """Each way to run one layer, by name."""
    words = torch.zeros(N, layout.words_per_row(K, 4), dtype=torch.int16)
    weight = PackedWeight(words, torch.ones(K // GROUP, N, dtype=torch.bfloat16), None, 4, K, GROUP)
    x = torch.zeros(rows, 1, K, dtype=torch.bfloat16)
    return {
        "dispatcher": lambda: torch.ops.llmq.w4a16_linear(x, None, *weight),
        "no layer": partial(call, None, x, weight),
        "layer": partial(call, Launches(), x, weight),
    }


def measure(rows: int, *, inference: bool = True) -> dict[str, float]:
    """Microseconds of one call by name: the median over rounds, in which the ways take turns."""
    taken: dict[str, list[float]] = {}
    mode = torch.inference_mode() if inference else torch.no_grad()
    with pretended_gpu() as call, mode:
        all_ways = ways(call, rows)
        for _ in range(1 + ROUNDS):
            for name, way in all_ways.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    way()
                taken.setdefault(name, []).append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * statistics.median(seconds[1:]) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for rows in arguments.rows:
        for inference in (True, False):
            taken = measure(rows, inference=inference)
            mode = "inference_mode" if inference else "no_grad"
            times = ", ".join(f"{name} {us:.1f} µs" for name, us in taken.items())
            print(f"{rows} rows, {mode}: {times}; layer {taken['dispatcher'] / taken['layer']:.1f} times faster")


if __name__ == "__main__":
    main()
