"""Weights whose scales the file cannot hold: they are noticed before they are rounded, and get another place.

Many formats store scales as float16, which ends at 65504, and below 6.1e-5 engines flush it to zero. Larger weights
would be clipped, and a layer of tiny weights would become zeros. So such a layer gets float32 scales where the format
has them. Elsewhere it gets the next grid of `repair.py` that can hold it, or is kept in float.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmq.model.build.block import Block
from llmq.numerics import affine_grid
from llmq.numerics.affine_grid import Bounded, Grid, Products, ScaleDtype, dtype_of
from llmq.numerics.k_quant_grid import largest_integer
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import value_table
from llmq.report.record import BlockReport
from llmq.steps.repair import change, fused, part_of
from llmq.steps.round_together import Group
from llmq.steps.run import Run

UNBOUNDED = Bounded(torch.float32, 1e-37)
CHANGED = 0.1  # relative change of a scale by its storage that is not yet looked at
LOST = 1e-3  # of the sum of squares; rounding to 4 bits costs about ten times as much
SHARED_COLUMNS, SHARED_SMALLEST = 256, 6e-7  # of the scales of a two-level grid, which may be subnormal


def in_range(run: Run, block: Block, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The weights of the groups, divided by the dtype of their scales, and notes for the user.

    A weight that needs another grid gets it; one that is kept in float is in no group.
    """
    weights = {path: weight for group in groups for path, weight in group.weights.items() if group.schemes[path]}
    wide, notes = set[str](), list[str]()

    def problem(path: str, scheme: WeightScheme | None = None, values: ScaleDtype | None = None) -> str | None:
        planned = scheme or run.plans[path].scheme.weights
        assert planned is not None, "only weights with a grid are checked"
        return out_of_range(weights[path], planned, values or run.options.scale_dtype)

    def all_hold(unit: Sequence[str], grid: WeightScheme) -> bool:
        return not any(problem(path, grid) for path in unit)

    for unit in fused(block, weights):
        problems = {path: text for path in unit if (text := problem(path)) is not None}
        if not problems:
            continue
        if run.layout.any_scale_dtype and not any(problem(path, values=torch.float32) for path in problems):
            wide.update(problems)
            notes += [f"{run.plans[path].name}: float32 scales, because {text}" for path, text in problems.items()]
            continue
        _, texts = change(run, block, unit, problems, partial(all_hold, unit))
        notes += texts
    usual = [part_of(run, group, weights.keys() - wide) for group in groups]
    others = [replace(part_of(run, group, wide), scales=_in_float32(group.scales)) for group in groups]
    return [group for group in (*usual, *others) if group.weights], notes


def _in_float32(values: ScaleDtype | None) -> ScaleDtype:
    """The values of the scales of a group, in float32."""
    return Products(torch.float32) if isinstance(values, Products) else torch.float32


def out_of_range(weight: Tensor, scheme: WeightScheme, values: ScaleDtype) -> str | None:
    """Why the scales of a weight (N, K) float32 on a grid cannot be stored as `values`; None if they can."""
    if scheme.few_scales:  # what is lost next to a fused weight that is far larger is seen in the output (`repair.py`)
        return None
    needed, stored = _shared_scales(weight, scheme) if scheme.two_level else _scales(weight, scheme, values)
    changed = (stored - needed).abs() > CHANGED * needed
    squares = weight.square().reshape(*needed.shape, -1).sum(-1)  # (N, G)
    changed &= squares > 0
    if not bool(changed.any()):
        return None
    lost = float(squares[changed].sum() if scheme.two_level else _lost(weight, scheme, values, changed.any(1)))
    share = lost / float(squares.sum())
    if share < LOST:
        return None
    dtype = torch.float16 if scheme.two_level else dtype_of(values)
    smallest = SHARED_SMALLEST if scheme.two_level else affine_grid.smallest(values)
    return (
        f"it needs scales of {float(needed[changed].min()):.1e} to {float(needed[changed].max()):.1e}, but "
        f"{str(dtype).removeprefix('torch.')} scales are {smallest:.1e} to {torch.finfo(dtype).max:.1e}, with which "
        f"{min(share, 1):.1%} of the weight's sum of squares would be lost"
    )


def _scales(weight: Tensor, scheme: WeightScheme, values: ScaleDtype) -> tuple[Tensor, Tensor]:
    """(N, G) float32 each: min-max scales, and the scales that are stored for them."""
    needed = affine_grid.fit_minmax(weight, scheme, UNBOUNDED).scales.abs()
    return needed, affine_grid.storable(needed, values).to(torch.float32)


def _shared_scales(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """The same for the scales that 256 columns of a two-level grid share, which are float16."""
    columns = SHARED_COLUMNS if weight.shape[1] % SHARED_COLUMNS == 0 else weight.shape[1]
    largest = weight.abs().reshape(len(weight), -1, columns).amax(-1)
    table = value_table(scheme)
    steps = table.top if table else scheme.middle if scheme.symmetric else scheme.levels
    needed = largest / (steps * largest_integer(scheme))
    top = float(torch.finfo(torch.float16).max)
    return needed, needed.clamp(SHARED_SMALLEST, top)


def _lost(weight: Tensor, scheme: WeightScheme, values: ScaleDtype, rows: Tensor) -> Tensor:
    """The additional squared error of the chosen rows (N,) bool, because their scales are stored as `values`."""
    part = weight if scheme.shares_rows else weight[rows]

    def error(grid: Grid) -> Tensor:
        return (grid.quantized(grid.encode(part)).dequantize() - part).square().sum()

    return error(affine_grid.fit_minmax(part, scheme, values)) - error(affine_grid.fit_minmax(part, scheme, UNBOUNDED))


def reason(name: str, blocks: Sequence[BlockReport]) -> str | None:
    """Why a layer was kept in float, from the notes of its block; None if they do not name it."""
    start, notes = f"{name}: kept in float, because ", [note for block in blocks for note in block.notes]
    return next((note.removeprefix(start) for note in notes if note.startswith(start)), None)
