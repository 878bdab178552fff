"""The expected time of each block and layer in the loop over blocks, without block tuning: the basis of progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmq.cost import passes, solver
from llmq.cost.machine import Machine
from llmq.cost.work import total
from llmq.cost.workload import Group, PlannedBlock, Workload
from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Shares:
    """Seconds of each block, and of each group, by the path of its first layer: its layers are finished together."""

    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    head: float = 0.0


def shares(work: Workload, machine: Machine, head: WeightScheme | None) -> Shares:
    """Equal blocks have equal shares; `head` is the grid of the head, or None."""
    known: dict[PlannedBlock, tuple[float, dict[str, float]]] = {}
    blocks, layers = dict[str, float](), dict[str, float]()
    outlines = dict(zip(work.outline.paths, work.outline.blocks, strict=True))
    for path, outline in outlines.items():
        block = PlannedBlock(outline, tuple(work.grid(path, layer) for layer in outline.layers))
        if block not in known:
            known[block] = _of_block(work, machine, block)
        blocks[path], of_layers = known[block]
        layers |= {f"{path}.{name}": seconds for name, seconds in of_layers.items()}
    if head is None:
        return Shares(blocks, layers)
    group = Group(work.outline.width, (work.outline.vocabulary,), (head,), 1.0)
    solved = total(list(solver.by_stage(replace(work, at_head=True), group).values()))
    return Shares(blocks, layers, machine.seconds(solved))


def _of_block(work: Workload, machine: Machine, block: PlannedBlock) -> tuple[float, dict[str, float]]:
    """The seconds of a block, and of its layers by name."""
    outline, layers = block.outline, dict[str, float]()
    streams = work.streams if work.method.needs_calibration else 0  # without text, blocks do not run
    whole = machine.seconds(passes.streams(work, block, last=False))
    for numbers, until, group in zip(outline.groups, outline.until, block.groups, strict=True):
        if not group.rows:
            continue
        solved = machine.seconds(total(list(solver.by_stage(work, group).values())))
        reached = machine.seconds(passes.passed(work, until, work.sequences) * streams)
        whole += solved
        first = next(number for number in numbers if block.grids[number] is not None)
        layers[outline.layers[first].name] = solved + reached
    return whole, layers
