"""`--target-bits`: which layers get more bits than others, so that the model suffers least.

    minimise  Σ_u ε_u,c(u)    where    Σ_u bits_u,c(u) ≤ target · Σ_u weights_u

over one choice c(u) for each unit u of layers that must be alike (`mixed_precision/sensitivity.py` finds the units, and
measures ε as the KL divergence that the choice alone causes; `mixed_precision/knapsack.py` solves it).  Choices are 4
bits in groups of 128 or of 32, 8 bits in groups of 128, the grid that the run asks for, and to leave the unit as it
is, at no loss.  All of them are what serving engines load, side by side in one file: fused layers share their grid.

Bits are all that the format writes for a weight (codes, scales, zeros, and what else it wants), averaged over the
layers that the run would quantize; a layer that is left as it is counts with all of its bits.  Layers that a `--skip`
or an `--override` names are not touched.

The plan becomes overrides and skips of the run's own settings.  They are stored with the model, so the same model can
be made again from them without measuring; nothing is drawn at random, so a repeated command comes to the same plan.
"""

import functools
import math
import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmq.algorithms import Options
from llmq.checkpoint.reader import Checkpoint
from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError
from llmq.formats.base import Layout
from llmq.mixed_precision.knapsack import Choice, allocate
from llmq.mixed_precision.sensitivity import Candidate, Layer, Question
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.affine_grid import dtype_of
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.patterns import matches
from llmq.report.sensitivity import Sensitivity, Unit
from llmq.runtime.open_skeleton import stored_bytes
from llmq.steps.layer_plans import alike, plan_layers

LEFT = "as it is"
MANY = 8  # layers of one unit
GRIDS = ((4, 128), (4, 32), (8, 128))  # bits, group size


@dataclass(frozen=True)
class Spending:
    """A plan: each unit's grid, None where it stays as it is; bits on average; the KL that it should cost."""

    asked: float
    bits: float
    kl: float
    grids: tuple[str | None, ...]
    units: tuple[Unit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what each layer gets, by its name."""
        pairs = zip(self.grids, self.units, strict=True)
        layers = {name: grid or LEFT for grid, unit in pairs for name in unit.names}
        return {"asked": self.asked, "bits_per_weight": self.bits, "predicted_kl": self.kl, "layers": layers}

    def __str__(self) -> str:
        layers: dict[str, int] = {}
        for grid, unit in zip(self.grids, self.units, strict=True):
            layers[grid or LEFT] = layers.get(grid or LEFT, 0) + len(unit.names)
        parts = ", ".join(f"{layers[grid]} layers {grid}" for grid in sorted(layers))
        return f"{self.bits:.3f} of {self.asked:g} bits: {parts}; predicted KL {self.kl:.4g}"


def schemes_to_try(asked: WeightScheme, grids: Iterable[tuple[int, int]] = GRIDS) -> list[WeightScheme]:
    """The grids to choose from, with zeros as the run has them; the one that it asks for is among them."""
    tried = [WeightScheme(bits, size, asked.symmetric) for bits, size in grids]
    return list(dict.fromkeys([*tried, asked]))


def ask(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    settings: QuantConfig,
    rounding: str,
    layout: Layout,
    options: Options,
    schemes: Sequence[WeightScheme] = (),
) -> Question:
    """What is to be measured on `schemes`, by default those to choose from: every layer that the run would quantize.

    Raises ConfigError where the format or the target of the settings rules every plan out.
    """
    name = skeleton.weights.module_name
    linears = {path: module for block in skeleton.blocks for path, module in block.linears.items()}
    shapes = {path: (name(path), module.out_features, module.in_features) for path, module in linears.items()}
    stored_bits = {path: 8 * stored_bytes(skeleton, checkpoint, f"{name(path)}.weight") for path in linears}
    tried = schemes or schemes_to_try(settings.scheme)
    if settings.target_bits is not None and layout.one_grid:
        raise ConfigError(
            f"{layout.name} files have one grid for all layers, and --target-bits chooses one for each",
            hint="use --format compressed-tensors, or gptq",
        )
    layers = candidates(shapes, stored_bits, tried, settings, layout, dtype_of(options.scale_dtype), skeleton.alike())
    if settings.target_bits is not None:
        _require_reachable(layers.values(), settings.target_bits)
    return Question(layers, tuple(str(scheme) for scheme in tried), rounding, options)


def candidates(
    shapes: Mapping[str, tuple[str, int, int]],
    stored_bits: Mapping[str, int],
    schemes: Iterable[WeightScheme],
    settings: QuantConfig,
    layout: Layout,
    scale_dtype: torch.dtype,
    units: Sequence[Sequence[str]] = (),
) -> dict[str, Layer]:
    """By its path, each layer of `shapes` (name, out_features, in_features) that may be given any of `schemes`.

    `stored_bits` is what each takes as it is; the layers of each of the `units` are alike.  Raises ConfigError for a
    scheme that the format can never hold.
    """
    settled = {path for path, shape in shapes.items() if _settled(shape[0], settings)}
    settled.update(path for unit in units if settled.intersection(unit) for path in unit)
    free = {path: shape for path, shape in shapes.items() if path not in settled}
    units = [unit for unit in units if not settled.intersection(unit)]
    if not free:
        raise ConfigError("no layer is left to spend bits on", hint="see --skip and --override")

    @functools.cache
    def packed_bits(rows: int, columns: int, scheme: WeightScheme) -> int:
        return _packed_bits(rows, columns, scheme, layout, scale_dtype)

    by_scheme = []
    for scheme in schemes:
        plain = settings.replace(scheme=scheme, overrides=(), target_bits=None)
        plans = dict(zip(free, plan_layers(free.values(), plain, layout), strict=True))
        by_scheme.append(alike(plans, units, plain, layout))
    found = {}
    for path, (name, rows, columns) in free.items():
        each = [plans[path] for plans in by_scheme]
        ways = tuple(
            Candidate(grid, packed_bits(rows, columns, grid) if grid else stored_bits[path])
            for grid in (plan.scheme.weights for plan in each)
        )
        if any(way.scheme is not None for way in ways):
            found[path] = Layer(name, rows * columns, stored_bits[path], ways)
    return found


def _require_reachable(layers: Iterable[Layer], target: float) -> None:
    """Refuse a target below what the smallest grids take."""
    listed = list(layers)
    least = sum(min(way.bits for way in layer.candidates) for layer in listed) / sum(layer.weights for layer in listed)
    if least > target:
        raise ConfigError(
            f"{target:g} bits a weight are asked for, and the smallest grids take {least:.3f}, scales counted",
            hint=f"ask for {math.ceil(100 * least) / 100:.2f} or more, or add a smaller grid: --bits 3",
        )


def spend(found: Sensitivity, target: float) -> Spending:
    """The plan of least predicted KL within `target` bits a weight; raises ConfigError where there is none."""
    weights = sum(unit.weights for unit in found.units)
    choices = [
        [*(Choice(effect.bits, effect.kl) for effect in unit.effects), Choice(unit.float_bits, 0.0)]
        for unit in found.units
    ]
    taken = allocate(choices, int(target * weights))
    spent = [each[index] for each, index in zip(choices, taken, strict=True)]
    grids = tuple(None if index == len(found.grids) else found.grids[index] for index in taken)
    return Spending(target, sum(s.bits for s in spent) / weights, sum(s.loss for s in spent), grids, found.units)


def settled(settings: QuantConfig, plan: Spending) -> QuantConfig:
    """The settings that carry a plan out: an override or a skip for each layer that gets something else than the rest.

    They ask for no target any more.
    """
    overrides, skip = list(settings.overrides), list(settings.skip)
    for grid, unit in zip(plan.grids, plan.units, strict=True):
        if grid is None:
            skip += _patterns(unit, plan.units)
            continue
        [effect] = (effect for effect in unit.effects if effect.grid == grid)
        shared = effect.schemes[0]
        if shared is not None and all(scheme == shared for scheme in effect.schemes):
            if shared != settings.scheme:
                patterns = _patterns(unit, plan.units)
                overrides += (_override(pattern, shared) for pattern in patterns)
            continue
        for name, scheme in zip(unit.names, effect.schemes, strict=True):
            if scheme is None:
                skip.append(name)
            elif scheme != settings.scheme:
                overrides.append(_override(name, scheme))
    return settings.replace(overrides=tuple(overrides), skip=tuple(skip), target_bits=None)


def _override(pattern: str, scheme: WeightScheme) -> Override:
    return Override(pattern=pattern, bits=scheme.bits, group_size=scheme.group_size)


def _patterns(unit: Unit, units: Iterable[Unit]) -> tuple[str, ...]:
    """What fits the layers of a unit and no others: their names, but one pattern for the many of a layer's experts."""
    if len(unit.names) < MANY:
        return unit.names
    prefix = os.path.commonprefix(unit.names).rpartition(".")[0]
    others = (name for other in units if other is not unit for name in other.names)
    return unit.names if not prefix or any(name.startswith(f"{prefix}.") for name in others) else (f"{prefix}.*",)


def _settled(name: str, settings: QuantConfig) -> bool:
    """Whether the user has said what is to become of a layer."""
    return any(matches(pattern, name) for pattern in (*settings.skip, *(o.pattern for o in settings.overrides)))


def _packed_bits(rows: int, columns: int, scheme: WeightScheme, layout: Layout, scale_dtype: torch.dtype) -> int:
    """What the format takes for such a weight, found by packing an empty one: some files hold more than they must."""
    groups = columns // scheme.columns_per_group(columns)
    zeros = None if scheme.symmetric else torch.zeros(rows, groups, dtype=torch.int16)
    codes, scales = torch.zeros(rows, columns, dtype=torch.uint8), torch.ones(rows, groups, dtype=scale_dtype)
    packed = layout.pack(QuantizedTensor(codes, scales, zeros, scheme))
    return sum(8 * tensor.nbytes for tensor in packed.values())
