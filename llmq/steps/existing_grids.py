"""Layers whose weights already lie on a grid: found before a run from a few rows, and stored on that grid in the run.

    trained for 4 bits, or dequantized ─► weights on a grid ─► the same codes and scales in the file

No stage of the method changes such a layer.  A transform would move its weights off the grid.  A target, a refinement
or tuning could compensate for errors of other layers, but would add an error to weights that have none.  What can be
gained is small compared with the second rounding, so exact weights have priority.

If the scheme of a layer cannot hold its grid, the layer is quantized as usual, and a note names settings that would
hold it.  The maths is in `numerics/existing_grid.py` and `numerics/keep_grid.py`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms import Rounding
from llmq.checkpoint.reader import Checkpoint
from llmq.config import CONVERTIBLE, QuantConfig
from llmq.errors import LlmqError
from llmq.formats.base import Layout
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.affine_grid import ScaleDtype, dtype_of
from llmq.numerics.existing_grid import ExistingGrid, identify, sample
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.numerics.keep_grid import keep
from llmq.numerics.lattice import DIGITS
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import BITS, WeightScheme
from llmq.steps import output_layout
from llmq.steps.run import Run

ROWS, PLACES = 16, 4  # rows of a weight that are read before a run, at this many places
GGUF_TYPES = {"gguf:q4_0": "q4_0", "gguf:q4_1": "q4_1"}  # formats whose type can hold an existing grid
REMEDIES = 2  # that a note names
PROBED = 8  # layers with which remedies are tried


def kept_in(run: Run, block: Block) -> dict[str, Rounding]:
    """The weights of a loaded block that lie on grids that their schemes hold, by path."""
    result = {}
    for path, linear in block.linears.items():
        scheme = run.plans[path].scheme.weights
        stored = block.stored_dtype(f"{path.removeprefix(f'{block.path}.')}.weight")
        if scheme is None or linear.weight.dtype.itemsize < stored.itemsize:  # loading has rounded it
            continue
        if (rounding := kept(run, block.weight(path), stored, scheme)) is not None:
            result[path] = rounding
    return result


def kept(run: Run, weight: Tensor, stored: torch.dtype, scheme: WeightScheme) -> Rounding | None:
    """A weight (N, K) float32 on its existing grid; None if it has none that `scheme` holds.

    stored  its dtype in the checkpoint
    """
    known = keep(weight, stored, scheme, run.options.scale_dtype) if run.keep_grid else None
    if known is None:
        return None
    grid = None if scheme.floats else identify(sample(weight, ROWS), stored)
    name = str(grid or f"grid of {scheme}")
    note = _outcome(name, known.exact, run.options.scale_dtype)
    return Rounding(known.quantized, notes=(note,), existing_grid=name)


def _outcome(grid: str, exact: bool, values: ScaleDtype) -> str:
    if exact:
        return f"lossless: already on a {grid}"
    return f"already on a {grid}: codes are kept, scales are rounded to {_name(values)}"


def _name(values: ScaleDtype) -> str:
    return str(dtype_of(values)).removeprefix("torch.")


@dataclass(frozen=True)
class Sighting:
    """The grid of a layer as a few of its `rows` (n, K) float32 show it.

    stored   the dtype of the layer in the checkpoint
    exact    whether the planned scheme holds these rows without error; None if it cannot hold their codes
    outcome  what will happen with the layer
    """

    grid: ExistingGrid
    rows: Tensor
    stored: torch.dtype
    exact: bool | None
    outcome: str


def look(
    skeleton: Skeleton, checkpoint: Checkpoint, plans: Mapping[str, LayerPlan], values: ScaleDtype
) -> dict[str, Sighting]:
    """The layers that already lie on a grid, by path; of the experts of a layer, the first one stands for all.

    Layers that are stored as a part of another tensor are not looked at: a run will find their grids.
    """
    first = {path: unit[0] for unit in skeleton.alike() for path in unit}
    seen: dict[str, Sighting | None] = {}
    for path, plan in plans.items():
        representative = first.get(path, path)
        if plan.scheme.weights is None or (plan.out_features, plan.in_features) != _shape(plans[representative]):
            representative = path
        if representative not in seen:
            seen[representative] = _sighting(skeleton, checkpoint, plans[representative], representative, values)
        seen[path] = seen[representative]
    return {path: sighting for path in plans if (sighting := seen[path]) is not None}


def _shape(plan: LayerPlan) -> tuple[int, int]:
    return plan.out_features, plan.in_features


def _sighting(
    skeleton: Skeleton, checkpoint: Checkpoint, plan: LayerPlan, path: str, values: ScaleDtype
) -> Sighting | None:
    parameter, scheme = f"{path}.weight", plan.scheme.weights
    if scheme is None or skeleton.weights.is_borrowed(parameter):
        return None
    name = skeleton.weights.tensor_name(parameter)
    if name not in checkpoint or checkpoint.info(name).shape != _shape(plan):
        return None
    stored = checkpoint.info(name).dtype
    if stored not in DIGITS:
        return None
    rows = _rows(checkpoint, name).to(torch.float32)
    grid = identify(rows, stored)
    if grid is None:
        return None
    known = keep(rows, stored, scheme, values) if grid.share == 1 else None
    if known is not None:
        return Sighting(grid, rows, stored, known.exact, _outcome(str(grid), known.exact, values))
    if grid.share < 1:
        outcome = f"partly ({grid.share:.0%} of the groups) on a {grid}: rounded again"
    else:
        outcome = f"already on a {grid}, which {scheme} cannot hold: rounded again"
    return Sighting(grid, rows, stored, None, outcome)


def _rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """Some rows of a tensor (N, K)."""
    rows, each_place = checkpoint.info(name).shape[0], ROWS // PLACES
    if rows <= ROWS:
        return checkpoint.rows(name, 0, rows)
    starts = [place * (rows - each_place) // (PLACES - 1) for place in range(PLACES)]
    return torch.cat([checkpoint.rows(name, start, start + each_place) for start in starts])


@dataclass(frozen=True)
class Places:
    """Where the weights of a run could be stored: its settings and layout, and what other formats depend on."""

    settings: QuantConfig
    layout: Layout
    model_dtype: torch.dtype
    checkpoint: Checkpoint


def notes(sightings: Mapping[str, Sighting], plans: Mapping[str, LayerPlan], places: Places) -> list[str]:
    """One note for all layers with the same grid and outcome; with settings that hold the grid, if the plan does not.

    sightings  the result of `look`
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for path, sighting in sightings.items():
        whole = dataclasses.replace(sighting.grid, share=1.0)
        outcome = {True: "exact", False: "scales", None: "rounded"}[sighting.exact]
        alike.setdefault((str(whole), "partly" if sighting.grid.share < 1 else outcome), []).append(path)
    lines = []
    for (grid, outcome), paths in alike.items():
        layers, count = [sightings[path] for path in paths], f"{len(paths)} of {len(plans)} layers"
        if outcome == "exact":
            lines.append(f"lossless: already on a {grid} ({count})")
        elif outcome == "partly":
            share = min(layer.grid.share for layer in layers)
            lines.append(f"a part of the weights of {count}, {share:.0%} of the groups or more, lies on a {grid}")
        else:
            reason = "whose scales the format has to round"
            if outcome == "rounded":
                schemes = dict.fromkeys(str(plans[path].scheme.weights) for path in paths)
                reason = f"which {' and '.join(schemes)} cannot hold"
            remedies = " or ".join(_remedies(layers, places))
            solution = f"{remedies} keeps them exactly" if remedies else "no format of llmq keeps them exactly"
            lines.append(f"the weights of {count} lie on a {grid}, {reason}: {solution}")
    return lines


def _remedies(layers: list[Sighting], places: Places) -> list[str]:
    """Options with which the file holds all of these layers without error, at most one per format.

    They are tried with the rows of `PROBED` layers.
    """
    texts, probed = dict[str, str](), layers[:: -(-len(layers) // PROBED)]
    for name, flags, scheme, values in _candidates(layers[0].grid, places):
        if len(texts) == REMEDIES:
            break
        if name not in texts and all(
            (known := keep(s.rows, s.stored, scheme, values)) is not None and known.exact for s in probed
        ):
            texts[name] = " ".join(filter(None, (name, flags)))
    return list(texts.values())


def _candidates(grid: ExistingGrid, places: Places) -> Iterator[tuple[str, str, WeightScheme, ScaleDtype]]:
    """The option for the format, other options, the scheme that they give, and the values of its scales.

    The format of the run comes first, and needs no option.
    """
    settings, dtype = places.settings, places.model_dtype
    schemes = [] if grid.kind == "offsets" else list(_schemes(grid))
    if settings.format not in GGUF_GRIDS:
        yield from _on(places.layout, "", schemes, places)
    for name, kind in GGUF_TYPES.items():
        if name not in settings.formats and _writable(name, places.checkpoint):
            yield f"--format {name}", "", WeightScheme.of_blocks(kind), output_layout.GGUF_SCALES
    for name in CONVERTIBLE:
        if name not in settings.formats and (name != GGUF or _writable(name, places.checkpoint)):
            yield from _on(output_layout.layout_of((name,), dtype), f"--format {name}", schemes, places)


def _on(
    layout: Layout, name: str, schemes: list[WeightScheme], places: Places
) -> Iterator[tuple[str, str, WeightScheme, ScaleDtype]]:
    values = output_layout.scale_values(layout, places.model_dtype)
    for scheme in schemes:
        if layout.refusal(scheme, 1024, 1024) is None:
            yield name, _flags(scheme, places.settings.scheme), scheme, values


def _schemes(grid: ExistingGrid) -> Iterator[WeightScheme]:
    for bits in (bits for bits in BITS if bits >= grid.bits):
        for symmetric in (True, False):
            yield WeightScheme(bits, grid.group_size, symmetric)


def _flags(scheme: WeightScheme, requested: WeightScheme) -> str:
    """The options that change the requested scheme to another one."""
    flags = [f"--bits {scheme.bits}"] if scheme.bits != requested.bits else []
    flags += [f"--group-size {scheme.group_size}"] if scheme.group_size != requested.group_size else []
    if scheme.symmetric != requested.symmetric:
        flags.append("--symmetric" if scheme.symmetric else "--asymmetric")
    return " ".join(flags)


def _writable(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a .gguf file can be written for this model."""
    try:
        output_layout.require_writable((name,), checkpoint, checkpoint.names())
    except LlmqError:
        return False
    return True
