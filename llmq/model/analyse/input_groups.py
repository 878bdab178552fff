"""Watch a block run: which weight is multiplied by which activation.

A `TorchFunctionMode` sees every matrix product of the block's own forward, whichever module or function makes it.  An
operand that is a watched weight tells, with no names, what that weight's input is; weights that got the same input
form one *input group* (q, k, v; gate, up) and share their statistics.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.model.build.block import Block
from llmq.model.build.skeleton import Call
from llmq.numerics.input_stats import InputStats

MATMULS = {
    torch.nn.functional.linear,
    torch.addmm,
    torch.matmul,
    torch.mm,
    Tensor.addmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
}


@dataclass(frozen=True)
class InputGroup:
    """The linear layers `names` (as in `Block.linears`) that multiply one and the same input (..., in_features)."""

    names: tuple[str, ...]
    in_features: int


class MatmulWatcher(TorchFunctionMode):
    """While entered, calls `seen(name, input)` for each product with one of `weights` (name -> parameter)."""

    def __init__(self, weights: Mapping[str, Tensor], seen: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in MATMULS:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            for position, tensor in enumerate(tensors):
                name = self._names.get(tensor.untyped_storage().data_ptr())
                if name is not None and position > 0:
                    self._seen(
                        name, tensors[position - 1]
                    )  # (input, weight) for linear and matmul, (bias, input, weight)
        return func(*args, **(kwargs or {}))


def input_groups(block: Block, call: Call) -> list[InputGroup]:
    """The block's linear layers by the input that they share, in the order in which they are first run.

    A linear layer that does not run for this call is in no group; one that runs twice is where it was first.  Inputs
    are not rounded here: layers that share one would each get a rounded copy.
    """
    first: dict[tuple[Any, ...], list[str]] = {}
    placed: set[str] = set()
    kept: list[Tensor] = []  # alive until the end, so that no later tensor can be given the address of an earlier one

    def seen(name: str, inputs: Tensor) -> None:
        if name in placed:
            return
        placed.add(name)
        kept.append(inputs)
        where = inputs.data_ptr() if inputs.numel() else id(inputs)  # tensors of no rows have no address
        key = (where, inputs.numel(), inputs.shape[-1], inputs._version)
        first.setdefault(key, []).append(name)

    with MatmulWatcher(_weights(block.linears), seen), block.float_inputs():
        block.run(call)
    return [InputGroup(tuple(names), block.linears[names[0]].in_features) for names in first.values()]


def statistics(block: Block, groups: Sequence[InputGroup], calls: Iterable[Call]) -> dict[InputGroup, InputStats]:
    """Run the block on every call and sum up what each group's weights are fed."""
    device = {group: block.linears[group.names[0]].weight.device for group in groups}
    stats = {group: InputStats(group.in_features, device[group]) for group in groups}
    leaders = {group.names[0]: stats[group] for group in groups}  # one weight of a group sees what all see
    with MatmulWatcher(
        _weights({name: block.linears[name] for name in leaders}), lambda name, x: leaders[name].update(x)
    ):
        for call in calls:
            block.run(call)
    return stats


def inputs_of(block: Block, groups: Sequence[InputGroup], call: Call) -> tuple[dict[InputGroup, Tensor], Tensor]:
    """The very inputs (..., K) of each group for one call, and the block's output."""
    leaders = {group.names[0]: group for group in groups}
    inputs: dict[InputGroup, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        inputs[leaders[name]] = x.clone()

    with MatmulWatcher(_weights({name: block.linears[name] for name in leaders}), seen):
        output = block.run(call)
    return inputs, output


def _weights(linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    return {name: linear.weight for name, linear in linears.items()}
