"""The grid that a layer gets if its own grid cannot hold it: smaller groups, then 8 bits, then float.

    scales out of the range of the file   ─┐                   ┌─ groups of 32 columns
    output lost by the rounding           ─┴─► one step after ─┼─ 8 bits
                                                the other      └─ float

These are the last steps of the repairs. Earlier ones belong to the method: more damping, always in float64
(algorithms/factor.py), other tokens of the layer for an expert that sees few (model/passes/statistics.py), and rounding
to nearest on a searched grid where this is better than the method (steps/round_group.py). Every step is a note.

Engines run some layers as one, such as q, k and v. Such layers change together. Experts of a layer must share a grid
and are quantized one after the other, so their grid does not change.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from llmq.formats.base import Layout
from llmq.model.analyse.fused_names import fused_with
from llmq.model.build.block import Block
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.steps.round_together import Group
from llmq.steps.run import Run

LOST = 0.7  # relative error of a layer's output: about half of its sum of squares is lost
SMALL_GROUP = 32  # the smallest group for which the common engines have kernels
BITS = 8


def next_scheme(plans: Sequence[LayerPlan], layout: Layout) -> WeightScheme | None:
    """The grid after that of the first of these plans, such that the format holds it for all; None stands for float.

    With quantized inputs, engines must have a kernel for it, too.
    """
    scheme = plans[0].scheme.weights
    if scheme is None or layout.one_grid:
        return None

    def fits(grid: WeightScheme) -> bool:
        schemes = ((plan, Scheme(grid, plan.scheme.inputs)) for plan in plans)
        return all(layout.refusal_of(scheme, plan.out_features, plan.in_features) is None for plan, scheme in schemes)

    return next(filter(fits, _after(scheme, plans[0].in_features)), None)


def _after(scheme: WeightScheme, in_features: int) -> Iterator[WeightScheme]:
    if scheme.floats is not None:
        if scheme.bits < BITS:
            yield WeightScheme(BITS, SMALL_GROUP)
        return
    if scheme.block_type is None and scheme.columns_per_group(in_features) > SMALL_GROUP:
        yield dataclasses.replace(scheme, group_size=SMALL_GROUP)
    if scheme.bits < BITS:
        yield dataclasses.replace(scheme, bits=BITS) if scheme.block_type is None else WeightScheme.of_blocks("q8_0")


def restored(plan: LayerPlan, scheme: str) -> LayerPlan:
    """The plan of a layer for which an interrupted run has recorded this scheme."""
    planned = plan.scheme.weights
    if planned is None or str(planned) == scheme:
        return plan
    finer = list(_after(planned, plan.in_features))
    possible = [*finer, *(grid for first in finer for grid in _after(first, plan.in_features))]
    return next((plan.with_weights(grid, plan.reason) for grid in possible if str(grid) == scheme), plan)


def fused(block: Block, paths: Iterable[str]) -> list[list[str]]:
    """`paths` of layers, divided into those that must have the same grid; an expert is alone."""
    paths, units = list(paths), list[list[str]]()
    for path in paths:
        partners = [] if block.is_experts(path) else fused_with(path, paths)
        unit = next((unit for unit in units if unit[0] in partners), None)
        if unit is None:
            units.append([path])
        else:
            unit.append(path)
    return units


def to_round_again(
    run: Run, block: Block, groups: Sequence[Group], errors: Mapping[str, float]
) -> tuple[list[Group], set[str], list[str]]:
    """Give layers that lost their output the next grid.

    groups  the layers that were quantized
    errors  the relative error of the output of each, by path
    Returns the groups to quantize again, the paths of all layers that change, and notes for the user.
    """
    changed, notes = set[str](), list[str]()
    for unit in fused(block, errors):
        problems = {
            path: f"{errors[path]:.0%} of the norm of its output would be lost"
            for path in unit
            if LOST < errors[path] < math.inf
        }
        if problems:
            paths, texts = change(run, block, unit, problems, lambda _: True)
            changed.update(paths)
            notes += texts
    return [part for group in groups if (part := part_of(run, group, changed)).weights], changed, notes


def change(
    run: Run, block: Block, unit: Sequence[str], problems: Mapping[str, str], holds: Callable[[WeightScheme], bool]
) -> tuple[list[str], list[str]]:
    """Give the layers of a unit of `fused` the next grid that `holds` them, or keep them in float.

    problems  why layers of the unit need another grid, by path; there is at least one
    Returns the paths of the layers that change, and notes for the user.
    """
    if any(map(block.is_experts, unit)):
        return [], [f"{run.plans[path].name}: large error, because {problem}" for path, problem in problems.items()]
    partners = fused_with(unit[0], block.linears.keys())
    if any(path not in unit and run.plans[path].scheme.weights is not None for path in partners):
        unit, scheme = list(problems), None  # a partner is on another grid already
    else:
        plans = [run.plans[path] for path in unit]
        scheme = next_scheme(plans, run.layout)
        while scheme is not None and not holds(scheme):
            scheme = next_scheme([plan.with_weights(scheme, "") for plan in plans], run.layout)
    cause, notes = run.plans[next(iter(problems))].name, []
    for path in unit:
        plan = run.plans[path]
        outcome = "kept in float" if scheme is None else f"{scheme} instead of {plan.scheme.weights}"
        fusing = f"engines fuse it with {cause}, which is {'kept in float' if scheme is None else 'on that grid'}"
        run.plans[path] = plan.with_weights(scheme, f"{outcome}, because {problems.get(path, fusing)}")
        notes.append(f"{plan.name}: {run.plans[path].reason}")
    return list(unit), notes


def part_of(run: Run, group: Group, paths: Collection[str]) -> Group:
    """The layers of a group that are in `paths` and not kept in float, with the grids of their plans."""
    schemes = {path: run.plans[path].scheme.weights for path in group.weights if path in paths}
    schemes = {path: scheme for path, scheme in schemes.items() if scheme is not None}
    return dataclasses.replace(group, weights={path: group.weights[path] for path in schemes}, schemes=schemes)
