"""The committed blocks while they are tuned: in memory, or one at a time from disk.

The tuning state of a weight takes 12 bytes per quantized value, in addition to the value. If the states of all weights
and all blocks in float fit into memory, they are kept there. Otherwise a block is assembled from its committed tensors
and from its states in the staging folder whenever it is needed, and only one block and the state of one weight are in
memory. Both ways compute the same numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Rates, State
from llmq.methods import Method
from llmq.model.build.block import Block
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.report.record import BlockReport
from llmq.steps.run import Run


class TunedBlocks:
    """`names[index]` maps the path of each tuned weight of block `index` to its name in the checkpoint."""

    def __init__(self, run: Run, *, resident: bool) -> None:
        self._run = run
        self._resident = resident
        self._states: dict[str, State] = {}  # by name; of all weights if they are kept in memory
        self._step: dict[str, int] = {}  # by name, the next step of a weight
        reports = [BlockReport.from_dict(run.writer.read(i)[1], resumed=True) for i in range(len(run.skeleton.blocks))]
        self.names = [{run.paths[layer.name]: layer.name for layer in report.layers} for report in reports]
        pairs = zip(self.names, reports, strict=True)
        self._transformed = {path for names, report in pairs if _transformed(report, run.method) for path in names}

    @property
    def paths(self) -> set[str]:
        return {path for names in self.names for path in names}

    def start(self, rates: Rates) -> None:
        """Start from the committed values; v comes from the float weights, unless a transform has changed them."""
        read = self._run.skeleton.weights.original

        def start(path: str, origin: QuantizedTensor) -> State:
            known = path not in self._transformed
            reference = read(f"{path}.weight").to(origin.codes.device, torch.float32) if known else None
            return kl_tuning.start(origin, reference, rates)

        self._make(0, start)

    def resume(self, step: int) -> None:
        """Continue with the states that were saved before `step`."""
        paths = {path: name for names in self.names for path, name in names.items()}
        revision = self._run.writer.revision
        self._make(step, lambda path, origin: kl_tuning.restored(origin, revision.read_state(paths[path], step)))

    def _make(self, step: int, state: Callable[[str, QuantizedTensor], State]) -> None:
        for index, names in enumerate(self.names):
            for path, name in names.items():
                self._step[name] = step
                first = state(path, self._origin(index, name))
                if self._resident:
                    self._states[name] = first
                else:
                    self._run.writer.revision.write_state(name, step, kl_tuning.tensors(first))
            if self._resident:
                self._fill(index)

    @contextmanager
    def ready(self, block: Block) -> Iterator[None]:
        """While open, the block has its tuned weights."""
        if self._resident:
            yield
            return
        self._fill(block.index)
        try:
            yield
        finally:
            block.free()

    def update(self, block: Block, rates: Rates, step: int) -> None:
        """Update the weights of a block from their gradients, in step number `step`."""
        for path, name in self.names[block.index].items():
            weight = block.linears[path].weight
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # None: the layer was not run
            state = self._state(block.index, name)
            kl_tuning.update(state, gradient, rates, step)
            self._step[name] = step + 1
            if self._resident:
                block.set_weight(path, kl_tuning.result(state).dequantize())
                continue
            self._run.writer.revision.write_state(name, step + 1, kl_tuning.tensors(state))
            self._run.writer.revision.drop_state(name, step)
            del state  # before the next one is read

    def write_states(self, step: int) -> None:
        """Write the states that are kept in memory to disk, as those before `step`."""
        for name, state in self._states.items():
            self._run.writer.revision.write_state(name, step, kl_tuning.tensors(state))

    def write_blocks(self, step: int) -> float:
        """Write all blocks in their current version, packed; returns the fraction of quantized values that changed."""
        moved = codes = 0
        for index, names in enumerate(self.names):
            packed: dict[str, Tensor] = {}
            for path, name in names.items():
                origin, now = self._origin(index, name), self._now(index, name)
                moved += int((origin.codes != now.codes).sum())
                codes += now.codes.numel()
                packed |= self._run.pack(path, now)
            self._run.writer.revision.write_block(index, step, packed)
        return moved / max(1, codes)

    def free(self) -> None:
        """Free all memory."""
        self._states = {}
        for block in self._run.skeleton.blocks:
            block.free()

    def _fill(self, index: int) -> None:
        tensors, _ = self._run.writer.read(index)
        tuned = {f"{name}.weight": name for name in self.names[index].values()}

        def read(stored: str) -> Tensor:
            if stored in tuned:
                return self._now(index, tuned[stored]).dequantize()
            return tensors[stored] if stored in tensors else self._run.skeleton.weights.stored_tensor(stored)

        self._run.skeleton.blocks[index].fill(read, tuned)

    def _origin(self, index: int, name: str) -> QuantizedTensor:
        """A weight as it was committed."""
        if name in self._states:
            return self._states[name].origin
        tensors, _ = self._run.writer.read(index)
        return self._run.unpack(name, tensors).to(self._run.skeleton.device)

    def _state(self, index: int, name: str) -> State:
        if name in self._states:
            return self._states[name]
        stored = self._run.writer.revision.read_state(name, self._step[name])
        return kl_tuning.restored(self._origin(index, name), stored)

    def _now(self, index: int, name: str) -> QuantizedTensor:
        """The current version of a weight; only the parts of its state that this needs are read."""
        if name in self._states:
            return kl_tuning.result(self._states[name])
        stored = self._run.writer.revision.read_state(name, self._step[name])
        return kl_tuning.quantized(self._origin(index, name), *_values(stored, self._run.skeleton.device))


def _values(stored: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """v and θ of a state on disk."""
    keys = (f"{part}.value" for part in kl_tuning.PARTS)
    rounding, scales = (stored[key].to(device) if key in stored else None for key in keys)
    return rounding, scales


def _transformed(report: BlockReport, method: Method) -> bool:
    """Whether a transform changed the block's float weights; without validation, reports do not show it: assume so."""
    kept = any(gain.kept and gain.stage in method.transforms for gain in report.gains)
    return bool(method.transforms) and (kept or not method.validation)
