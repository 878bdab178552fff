"""The committed blocks while they are tuned: packed in memory, and unpacked one at a time.

    committed tensors of a block (packed) ─┐
    θ of each group, v of each weight ─────┴─► the block's weights in float, while it runs ─► freed

The tensors of all blocks stay packed in memory if they fit, and are otherwise read from the staging folder whenever a
block runs. θ takes 12 bytes per group, and v 6 bytes per weight where quantized values are tuned. These stay in memory
in either case. So memory grows with the size of the packed model, and not with its size in float.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Moving, Rates, State
from llmq.methods import Method
from llmq.model.build.block import Block
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.report.record import BlockReport, LayerReport
from llmq.steps.run import Run

Parameters = tuple[Moving | None, Moving | None]
"""What is tuned of a weight: v of its quantized values, and θ of its scales."""


class TunedBlocks:
    """`names[index]` maps the path of each tuned weight of block `index` to its name in the checkpoint.

    in_memory  whether the packed tensors of all blocks stay in memory
    """

    def __init__(self, run: Run, *, in_memory: bool) -> None:
        self._run = run
        self._in_memory = in_memory
        self._committed: dict[int, Mapping[str, Tensor]] = {}  # by block
        self._parameters: dict[str, Parameters] = {}  # by name
        reports = committed(run)
        self.names = [{run.paths[layer.name]: layer.name for layer in moving(report)} for report in reports]
        self._kept = {layer.name for report in reports for layer in report.layers if layer.existing_grid}
        pairs = zip(self.names, reports, strict=True)
        self._transformed = {path for names, report in pairs if _transformed(report, run.method) for path in names}

    @property
    def paths(self) -> set[str]:
        return {path for names in self.names for path in names}

    def start(self, rates: Rates) -> None:
        """Start from the committed values; v comes from the float weights, unless a transform has changed them."""
        read = self._run.skeleton.weights.original

        def start(path: str, index: int, name: str) -> Parameters:
            origin, reference = self._origin(index, name), None
            if rates.rounding and path not in self._transformed:
                reference = read(f"{path}.weight").to(origin.codes.device, torch.float32)
            state = kl_tuning.start(origin, reference, rates, kl_tuning.SHORT)
            return state.rounding, state.scales

        self._make(start)

    def resume(self, step: int) -> None:
        """Continue with the parameters that were saved before `step`."""
        revision = self._run.writer.revision

        def restored(_: str, index: int, name: str) -> Parameters:
            state = kl_tuning.restored(self._origin(index, name), revision.read_state(name, step))
            return state.rounding, state.scales

        self._make(restored)

    def _make(self, parameters: Callable[[str, int, str], Parameters]) -> None:
        for index, names in enumerate(self.names):
            for path, name in names.items():
                self._parameters[name] = parameters(path, index, name)

    @contextmanager
    def ready(self, block: Block) -> Iterator[None]:
        """While open, the block has its tuned weights in float."""
        tensors, names = self._tensors(block.index), self.names[block.index]
        tuned = {f"{name}.weight": name for name in names.values()}
        kept = {f"{name}.weight": name for name in self._kept}

        def read(stored: str) -> Tensor:
            if stored in kept:
                return self._origin(block.index, kept[stored]).dequantize()
            if stored in tuned:
                return kl_tuning.result(self._state(block.index, tuned[stored])).dequantize()
            return tensors[stored] if stored in tensors else self._run.skeleton.weights.stored_tensor(stored)

        block.fill(read, {*tuned, *kept})
        try:
            yield
        finally:
            block.free()

    def update(self, block: Block, rates: Rates, step: int) -> None:
        """Update the parameters of a block from the gradients of its weights, in step number `step`."""
        for path, name in self.names[block.index].items():
            weight = block.linears[path].weight
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # None: the layer was not run
            kl_tuning.update(self._state(block.index, name), gradient, rates, step)

    def write_states(self, step: int) -> None:
        """Write the parameters to disk, as those before `step`."""
        for index, names in enumerate(self.names):
            for name in names.values():
                tensors = kl_tuning.tensors(self._state(index, name))
                self._run.writer.revision.write_state(name, step, tensors)

    def write_blocks(self, step: int) -> float:
        """Write all blocks in their current version, packed; returns the fraction of quantized values that changed."""
        moved = codes = 0
        for index, names in enumerate(self.names):
            packed: dict[str, Tensor] = {}
            for path, name in names.items():
                state = self._state(index, name)
                origin, now = state.origin, kl_tuning.result(state)
                moved += int((origin.codes != now.codes).sum())
                codes += now.codes.numel()
                packed |= self._run.pack(path, now)
            self._run.writer.revision.write_block(index, step, packed)
        return moved / max(1, codes)

    def free(self) -> None:
        """Free all memory."""
        self._parameters, self._committed = {}, {}
        for block in self._run.skeleton.blocks:
            block.free()

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        """The tensors of a block as they were committed."""
        if index in self._committed:
            return self._committed[index]
        tensors, _ = self._run.writer.read(index)
        if not self._in_memory:
            return tensors
        self._committed[index] = {name: tensors[name] for name in tensors}
        return self._committed[index]

    def _origin(self, index: int, name: str) -> QuantizedTensor:
        """A weight as it was committed."""
        return self._run.unpack(name, self._tensors(index)).to(self._run.skeleton.device)

    def _state(self, index: int, name: str) -> State:
        return State(self._origin(index, name), *self._parameters[name])


def committed(run: Run) -> list[BlockReport]:
    """The reports of all committed blocks."""
    return [BlockReport.from_dict(run.writer.read(i)[1], resumed=True) for i in range(len(run.skeleton.blocks))]


def moving(report: BlockReport) -> list[LayerReport]:
    """The layers of a block that are tuned: not those that are stored on the grid that they already lay on."""
    return [layer for layer in report.layers if not layer.existing_grid]


def _transformed(report: BlockReport, method: Method) -> bool:
    """Whether a transform changed the block's float weights; without validation, reports do not show it: assume so."""
    kept = any(gain.kept and gain.stage in method.transforms for gain in report.gains)
    return bool(method.transforms) and (kept or not method.validation)
