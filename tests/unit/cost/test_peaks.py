"""The parts of peak memory, compared with what the code allocates."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from llmq import cost
from llmq.algorithms import Options
from llmq.config import QuantConfig
from llmq.cost import peaks
from llmq.cost.workload import Group, Workload
from llmq.methods import METHODS
from llmq.model.analyse.input_groups import input_groups
from llmq.model.build.block import Block, Call
from llmq.model.passes.backward import differentiable
from llmq.model.passes.replay import tensors_in
from llmq.model.passes.sequential import kept_bytes
from llmq.model.passes.statistics import stops_of
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.report.layer_metrics import layer_report
from llmq.steps.round_group import round_group
from tests.builders import skeleton_of, tokens

LENGTH, K, ROWS = 24, 384, (384, 128, 128)
GRID = WeightScheme(4, 64)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors that operations have created and that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in([args, kwargs])}
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return output


@functools.cache
def outline_of(model: Path) -> cost.Outline:
    return cost.observe(cost.skeleton_of(model), LENGTH)


def graph_bytes(block: Block, call: Call) -> int:
    """Bytes that the graph of a forward keeps, without the parameters of the block."""
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        _, output = differentiable(block, call, [linear.weight for linear in block.linears.values()])
    for parameter in block.module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()) + output.nbytes


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_sizes_are_those_of_a_real_forward(checkpoint: Callable[..., Path], name: str) -> None:
    model = checkpoint(name)
    skeleton, whole = skeleton_of(model), outline_of(model)
    outline = whole.blocks[0]
    assert whole.hidden * whole.itemsize == skeleton.hidden_bytes(LENGTH)
    assert len(whole.blocks) == len(skeleton.blocks)
    assert sum(block.parameters for block in whole.blocks) + whole.outside == sum(
        parameter.numel() for parameter in skeleton.model.parameters()
    )
    block, call = skeleton.blocks[0], skeleton.record(0, tokens(1, LENGTH))
    block.load()
    groups = input_groups(block, call)
    assert len(groups) == len(outline.groups)
    assert outline.kept * 4 == kept_bytes(block, stops_of(block, groups), call)
    assert outline.graph * 4 == pytest.approx(graph_bytes(block, call), rel=0.15)  # fused attention keeps other tensors


def workload(outline: cost.Outline, method: str) -> Workload:
    settings = QuantConfig(method=method, calibration={"samples": 8, "seqlen": LENGTH})
    return Workload(outline, METHODS[method], settings, {}, 2)


def summed(method: str) -> InputStats:
    """The statistics of random inputs, with float inputs and validation tokens if the method has them."""
    inputs = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(0))
    stats, floats = InputStats(K, torch.device("cpu")), inputs + 0.1 if METHODS[method].alphas else None
    stats.update(inputs, floats)
    if METHODS[method].validation:
        stats.begin_validation().update(inputs, floats)
    return stats


@pytest.mark.parametrize("method", ["gptq", "fast"])
def test_statistics_and_solver(checkpoint: Callable[..., Path], method: str) -> None:
    work, group = workload(outline_of(checkpoint("llama")), method), Group(K, ROWS, (GRID,) * len(ROWS), 1.0)
    stats = summed(method)
    matrices = [value for sums in (stats, stats.validation) if sums for value in vars(sums).values()]
    square = sum(m.nbytes for m in matrices if isinstance(m, Tensor) and m.dim() == 2)
    assert peaks.statistics(work, group) == square
    weights = {f"w{rows}.{number}": torch.randn(rows, K) for number, rows in enumerate(ROWS)}
    with PeakBytes() as allocated:
        copies = {path: weight.clone() for path, weight in weights.items()}
        for layer in round_group(copies, dict.fromkeys(copies, GRID), stats, METHODS[method], Options(torch.float16)):
            dequantized = layer.rounding.quantized.dequantize()
            layer_report(layer.path, layer.weight, dequantized, layer.rounding, {"codes": dequantized}, stats)
    assert peaks.solver(work, group) == pytest.approx(allocated.peak, rel=0.15)
