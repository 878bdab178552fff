"""Launches that a layer keeps: which calls use them, and that they get the same arguments as a first call."""

import copy
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmq_kernels import backend
from llmq_kernels.w4a16 import configs, counters, gpu, op, triton_kernel
from llmq_kernels.w4a16.launches import Launches
from llmq_kernels.w4a16.packed_weight import PackedWeight
from tests.kernels.test_w4a16_triton import arguments

N, K = 40, 640
CONFIG = configs.Config(16, 32, 4, 2, ctas_per_sm=1, scale="after")
TENSORS = 8  # the first arguments of a kernel: x, words, scales, zeros, bias, out, workspace, counters

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """Stands for a Triton kernel: it records arguments, by the normal way in `first`, of compiled ones in `again`."""

    arg_names = triton_kernel.fused4.arg_names

    def __init__(self) -> None:
        self.first: list[tuple[tuple[int, ...], list[Any]]] = []
        self.again: list[tuple[tuple[int, ...], list[Any], int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Compiled"]:
        def launch(*args: Any, **constants: Any) -> Compiled:
            named = [constants[name] for name in self.arg_names[len(args) :]]
            self.first.append((grid, [*(a.data_ptr() if isinstance(a, Tensor) else a for a in args), *named]))
            return Compiled(self)

        return launch


class Compiled:
    """What Triton returns for a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self._kernel.again.append((grid, list(args), stream))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A GPU whose kernels only record their arguments; CPU tensors take the way of CUDA tensors."""
    kernel = Kernel()
    table = configs.Table(64, 1 << 20, (configs.Choice(64, CONFIG),), {})
    machine = gpu.Machine(table, 4, assembly=False)
    monkeypatch.setattr(triton_kernel, "fused4", kernel)
    monkeypatch.setattr(gpu, "machine_of", lambda _: machine)
    monkeypatch.setattr(backend, "choose", lambda _: backend.Choice("triton", "pretended"))
    monkeypatch.setattr(counters, "current_stream", lambda _: 7)
    return kernel


def layer(*, zeros: str = "random", bias: bool = False, ordered: bool = False) -> tuple[PackedWeight[Any], Any]:
    case = arguments(1, N, K, 32, zeros=zeros, extras=True)
    order = case["column_order"] if ordered else None
    weight = PackedWeight(case["words"], case["scales"], case["zeros"], 4, K, 32, order)
    return weight, case["bias"].half() if bias else None


def rows(M: int) -> Tensor:
    return torch.ones(M, 1, K, dtype=torch.float16)


@pytest.mark.parametrize("extras", [False, True], ids=["least", "all"])
@pytest.mark.parametrize("M", [1, 17, 40])
def test_later_calls_launch_with_the_arguments_of_the_first(kernel: Kernel, M: int, extras: bool) -> None:
    weight, bias = layer(zeros="random" if extras else "none", bias=extras)
    launches, x = Launches(), rows(M)
    first = op._eagerly_on_gpu(x, weight, bias, launches)
    later = [op._eagerly_on_gpu(x, weight, bias, launches) for _ in range(3)]
    assert (len(kernel.first), len(kernel.again)) == (1, 3)
    (grid, given), (same_grid, repeated, stream) = kernel.first[0], kernel.again[-1]
    assert (same_grid, stream) == (grid, 7)
    assert repeated[:4] == given[:4] and repeated[TENSORS:] == given[TENSORS:]
    assert len(repeated) == len(kernel.arg_names)
    assert not extras or repeated[4] == given[4]
    assert repeated[5] == later[-1].data_ptr()
    assert {y.shape for y in (first, *later)} == {(M, 1, N)} and {y.dtype for y in later} == {x.dtype}
    splits = given[kernel.arg_names.index("SPLITS")]
    assert splits == grid[2] and (splits > 1) == (M == 1)
    unread = weight.words.data_ptr()
    assert (repeated[6] == unread, repeated[7] == unread) == (splits == 1, splits == 1)


def test_later_calls_skip_checks_and_choices(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, bias), launches = layer(), Launches()
    op._eagerly_on_gpu(rows(1), weight, bias, launches)
    for module, name in ((op, "check"), (backend, "choose"), (gpu, "machine_of"), (gpu, "cached_plan")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called again"))
    op._eagerly_on_gpu(rows(1), weight._replace(), bias, launches)  # a layer makes a new tuple in every call
    assert len(kernel.again) == 1


def test_reordered_columns_are_passed(kernel: Kernel) -> None:
    (weight, bias), launches, x = layer(ordered=True), Launches(), rows(2)
    for _ in range(2):
        op._eagerly_on_gpu(x, weight, bias, launches)
    assert len(kernel.again) == 1
    assert x.data_ptr() not in kernel.again[0][1]


def misaligned(x: Tensor) -> Tensor:
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, weight, bias: (rows(3), weight, bias),
        lambda x, weight, bias: (x.bfloat16(), weight, bias),
        lambda x, weight, bias: (misaligned(x), weight, bias),
        lambda x, weight, bias: (torch.cat([x, x], dim=2)[..., :K], weight, bias),
        lambda x, weight, bias: (x, weight._replace(words=weight.words.clone()), bias),
        lambda x, weight, bias: (x, weight._replace(scales=weight.scales.view(torch.float16)), bias),
        lambda x, weight, bias: (x, weight, bias.clone()),
        lambda x, weight, bias: (x, weight, None),
    ],
    ids=["rows", "dtype", "address", "strides", "words", "view of scales", "bias", "no bias"],
)
def test_another_call_is_a_first_call(kernel: Kernel, change: Callable[..., Any]) -> None:
    (weight, bias), launches = layer(bias=True), Launches()
    op._eagerly_on_gpu(rows(2), weight, bias, launches)
    op._eagerly_on_gpu(*change(rows(2), weight, bias), launches)
    assert (len(kernel.first), len(kernel.again)) == (2, 0)


def test_other_memory_in_the_same_tensor_is_a_first_call(kernel: Kernel) -> None:
    (weight, bias), launches = layer(bias=True), Launches()
    op._eagerly_on_gpu(rows(2), weight, bias, launches)
    for data in (bias.clone(), bias.float()):
        bias.data = data
        op._eagerly_on_gpu(rows(2), weight, bias, launches)
    assert (len(kernel.first), len(kernel.again)) == (3, 0)


def test_arrays_of_a_layer_are_not_kept_alive(kernel: Kernel) -> None:
    (weight, bias), launches = layer(bias=True), Launches()
    op._eagerly_on_gpu(rows(1), weight, bias, launches)
    held = [weakref.ref(array) for array in (weight.words, weight.scales, weight.zeros, bias)]
    del weight, bias
    assert [reference() for reference in held] == [None] * 4


def test_copies_start_empty(kernel: Kernel) -> None:
    (weight, bias), launches = layer(), Launches()
    op._eagerly_on_gpu(rows(1), weight, bias, launches)
    for copied in (copy.deepcopy(launches), pickle.loads(pickle.dumps(launches))):
        assert copied.again(rows(1), weight, bias) is None
    assert launches.again(rows(1), weight, bias) is not None


@pytest.mark.parametrize("M", [0, 65])
def test_calls_without_a_fused_launch_keep_nothing(kernel: Kernel, M: int) -> None:
    (weight, bias), launches = layer(), Launches()
    for _ in range(2):
        assert op._eagerly_on_gpu(rows(M), weight, bias, launches).shape == (M, 1, N)
    assert kernel.first == kernel.again == []


@pytest.mark.slow
def test_launch_benchmark_runs() -> None:
    command = [sys.executable, "-c", "from bench import launch; launch.CALLS = launch.ROUNDS = 2; launch.main()"]
    done = subprocess.run([*command, "--rows", "1"], capture_output=True, text=True, env=_compiling(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layer") == 6


def _compiling() -> dict[str, str]:
    """The environment without Triton's interpreter, in which `bench` and llmq_kernels can be imported."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
