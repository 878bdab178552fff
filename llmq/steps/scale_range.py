"""Weights whose scales the file cannot hold: they are noticed before they are rounded, and get another place.

Many formats store scales as float16, which ends at 65504, and below 6.1e-5 engines flush it to zero. Larger weights
would be clipped, and a layer of tiny weights would become zeros. So such a layer gets float32 scales where the format
has them, and is kept in float elsewhere.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq.model.analyse.fused_names import fused_with
from llmq.model.build.block import Block
from llmq.numerics import affine_grid
from llmq.numerics.affine_grid import Bounded, Grid, ScaleDtype, dtype_of
from llmq.numerics.input_stats import InputStats
from llmq.numerics.k_quant_grid import LARGEST
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import BlockReport
from llmq.steps.round_together import Group
from llmq.steps.run import Run

UNBOUNDED = Bounded(torch.float32, 1e-37)
CHANGED = 0.1  # relative change of a scale by its storage that is not yet looked at
LOST = 1e-3  # of the sum of squares; rounding to 4 bits costs about ten times as much
SHARED_COLUMNS, SHARED_SMALLEST = 256, 6e-7  # of the scales of a two-level grid, which may be subnormal


def groups_in_range(
    run: Run, block: Block, weights: Mapping[str, Tensor], stats: InputStats | None
) -> tuple[list[Group], list[str]]:
    """The weights (N, K) that share an input, by path, divided by the dtype of their scales, and notes for the user.

    A weight that is kept in float is in no group.
    """
    schemes = {path: run.plans[path].scheme.weights for path in weights}
    usual, wide, notes = dict[str, Tensor](), dict[str, Tensor](), []
    for path, weight in weights.items():
        scheme = schemes[path]
        problem = None if scheme is None else out_of_range(weight, scheme, run.options.scale_dtype)
        name = run.plans[path].name
        if problem is None and scheme is not None and (partner := _left_partner(run, block, path)) is not None:
            notes.append(f"{name}: kept in float, because engines fuse it with {partner}, which is kept in float")
            continue
        if problem is None or scheme is None:
            usual[path] = weight
        elif run.layout.any_scale_dtype and out_of_range(weight, scheme, torch.float32) is None:
            wide[path] = weight
            notes.append(f"{name}: float32 scales, because {problem}")
        elif block.is_experts(path):  # engines need the same grid for all experts of a layer
            usual[path] = weight
            notes.append(f"{name}: large error, because {problem}")
        else:
            notes.append(f"{name}: kept in float, because {problem}")
    groups = [Group(part, schemes, stats, scales) for part, scales in ((usual, None), (wide, torch.float32)) if part]
    return groups, notes


def _left_partner(run: Run, block: Block, path: str) -> str | None:
    """The name of a layer that engines fuse with this one and that has to be kept in float; None if there is none."""
    if block.is_experts(path):
        return None
    for partner in fused_with(path, block.linears.keys()):
        plan = run.plans[partner]
        weight, scheme = block.weight(partner), plan.scheme.weights
        if scheme is None or out_of_range(weight, scheme, run.options.scale_dtype) is None:
            continue
        if not (run.layout.any_scale_dtype and out_of_range(weight, scheme, torch.float32) is None):
            return plan.name
    return None


def out_of_range(weight: Tensor, scheme: WeightScheme, values: ScaleDtype) -> str | None:
    """Why the scales of a weight (N, K) float32 on a grid cannot be stored as `values`; None if they can."""
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
    needed = largest / (scheme.levels * LARGEST)
    top = float(torch.finfo(torch.float16).max)
    return needed, needed.clamp(SHARED_SMALLEST, top)


def _lost(weight: Tensor, scheme: WeightScheme, values: ScaleDtype, rows: Tensor) -> Tensor:
    """The additional squared error of the chosen rows (N,) bool, because their scales are stored as `values`."""
    part = weight if scheme.group_size == "tensor" else weight[rows]

    def error(grid: Grid) -> Tensor:
        return (grid.quantized(grid.encode(part)).dequantize() - part).square().sum()

    return error(affine_grid.fit_minmax(part, scheme, values)) - error(affine_grid.fit_minmax(part, scheme, UNBOUNDED))


def reason(name: str, blocks: Sequence[BlockReport]) -> str | None:
    """Why a layer was kept in float, from the notes of its block; None if they do not name it."""
    start, notes = f"{name}: kept in float, because ", [note for block in blocks for note in block.notes]
    return next((note.removeprefix(start) for note in notes if note.startswith(start)), None)
