"""Which linear layers of a block share an input.

A hook on every linear layer records its input. Layers that get the same tensor form an *input group* (q, k, v; gate,
up) and share their statistics.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.block import Block, Call
from llmq.numerics.input_histogram import InputHistogram
from llmq.numerics.input_stats import InputStats


@dataclass(frozen=True)
class InputGroup:
    """The linear layers `names` (as in `Block.linears`) that multiply the same input (..., in_features)."""

    names: tuple[str, ...]
    in_features: int


@contextmanager
def watching(linears: Mapping[str, nn.Linear], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `seen(name, input)` is called before each of these linear layers is run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: seen(name, args[0] if args else kwargs["input"])

    handles = [linear.register_forward_pre_hook(hook(name), with_kwargs=True) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(block: Block, call: Call) -> list[InputGroup]:
    """The block's linear layers, grouped by their input, in the order in which they are first run.

    A layer that is not run for this call is in no group; for a layer that is run twice the first time counts. Inputs
    are not quantized here: layers that share an input would each get a quantized copy.
    """
    first: dict[tuple[Any, ...], list[str]] = {}
    placed: set[str] = set()
    kept: list[Tensor] = []  # alive until the end, so that no later tensor gets the address of an earlier one

    def seen(name: str, inputs: Tensor) -> None:
        if name in placed:
            return
        placed.add(name)
        kept.append(inputs)
        address = inputs.data_ptr() if inputs.numel() else id(inputs)  # tensors without rows have no address
        key = (address, inputs.numel(), inputs.shape[-1], inputs._version)
        first.setdefault(key, []).append(name)

    with watching(block.linears, seen), block.float_inputs():
        block.run(call)
    return [InputGroup(tuple(names), block.linears[names[0]].in_features) for names in first.values()]


def statistics(
    block: Block, groups: Sequence[InputGroup], calls: Iterable[Call], unit: int = 0, *, histograms: bool = False
) -> dict[InputGroup, InputStats]:
    """Run the block on every call and collect the statistics of each group's input, `unit` tokens at once.

    With `histograms`, these are collected, too.
    """
    device = {group: block.linears[group.names[0]].weight.device for group in groups}
    stats = {group: InputStats(group.in_features, device[group], unit=unit) for group in groups}
    if histograms:
        for group, sums in stats.items():
            sums.histogram = InputHistogram(torch.cat([block.weight(name) for name in group.names]).square().sum(0))
    leaders = {group.names[0]: stats[group] for group in groups}  # all layers of a group have the same input
    with watching({name: block.linears[name] for name in leaders}, lambda name, x: leaders[name].update(x)):
        for call in calls:
            block.run(call)
    return stats


def inputs_of(block: Block, groups: Sequence[InputGroup], call: Call) -> tuple[dict[InputGroup, Tensor], Tensor]:
    """A copy of the input (..., K) of each group for one call, and the block's output."""
    leaders = {group.names[0]: group for group in groups}
    inputs: dict[InputGroup, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        inputs[leaders[name]] = x.clone()

    with watching({name: block.linears[name] for name in leaders}, seen):
        output = block.run(call)
    return inputs, output
