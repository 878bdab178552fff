"""`--target-bits`: choose which layers get more bits, so that the loss of the model is as low as possible.

    minimise  Σ_u ε_u,c(u)    where    Σ_u bits_u,c(u) ≤ target · Σ_u weights_u

over one choice c(u) for each unit u, a set of layers that must have the same grid. `mixed_precision/sensitivity.py`
finds the units and measures ε, the KL divergence that the choice alone causes; `mixed_precision/knapsack.py` solves the
problem. The choices are 4 bits in groups of 128 or of 32, 8 bits in groups of 128, the grid of the settings, and float,
which causes no loss. Serving engines load all of these grids in one file, because fused layers share their grid.

Bits include everything that the format writes for a weight (quantized values, scales, zero points and other tensors),
averaged over the layers that the run would quantize; a layer that is kept in float counts with its bits in float.
Layers that match a `--skip` or an `--override` are not changed.

The assignment becomes overrides and skips in the settings of the run. They are stored with the model, so the same model
can be made again from them without measuring. Nothing is random, so a repeated command makes the same choices.
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
from llmq.numerics.scheme import ACTIVATIONS, Scheme, WeightScheme
from llmq.patterns import matches
from llmq.report.sensitivity import Sensitivity, Unit
from llmq.runtime.open_skeleton import stored_bytes
from llmq.steps.layer_plans import alike, plan_layers

LEFT = "float"
MANY = 8  # units with at least this many layers get one pattern
GRIDS = ((4, 128), (4, 32), (8, 128))  # bits, group size


@dataclass(frozen=True)
class Spending:
    """An assignment of grids to units.

    target  the requested bits per weight
    bits    the bits per weight of the assignment
    kl      the predicted KL divergence
    grids   one per unit, None for float
    """

    target: float
    bits: float
    kl: float
    grids: tuple[str | None, ...]
    units: tuple[Unit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the grid of each layer by its name."""
        pairs = zip(self.grids, self.units, strict=True)
        layers = {name: grid or LEFT for grid, unit in pairs for name in unit.names}
        return {"asked": self.target, "bits_per_weight": self.bits, "predicted_kl": self.kl, "layers": layers}

    def __str__(self) -> str:
        layers: dict[str, int] = {}
        for grid, unit in zip(self.grids, self.units, strict=True):
            layers[grid or LEFT] = layers.get(grid or LEFT, 0) + len(unit.names)
        parts = ", ".join(f"{layers[grid]} layers {grid}" for grid in sorted(layers))
        return f"{self.bits:.3f} of {self.target:g} bits: {parts}; predicted KL {self.kl:.4g}"


def schemes_to_try(settings: QuantConfig, layout: Layout) -> list[WeightScheme]:
    """The schemes to choose from, symmetric or not like that of the settings, which is one of them.

    With quantized inputs only those for which engines have a product, and 8 bits with one scale per row.
    """
    scheme, inputs = settings.scheme, ACTIVATIONS[settings.activations]
    tried = [WeightScheme(bits, size, scheme.symmetric) for bits, size in GRIDS]
    if inputs is not None and layout.with_inputs is not None:
        rows = WeightScheme(8, "channel")
        tried = [grid for grid in (*tried, rows) if not layout.with_inputs.refusal(Scheme(grid, inputs))]
    return list(dict.fromkeys([*tried, scheme]))


def ask(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    settings: QuantConfig,
    rounding: str,
    layout: Layout,
    options: Options,
    schemes: Sequence[WeightScheme] = (),
) -> Question:
    """The layers to measure, those that the run would quantize, on `schemes`; default: the schemes to choose from.

    Raises ConfigError if the format or the target of the settings makes every assignment impossible.
    """
    name = skeleton.weights.module_name
    linears = {path: module for block in skeleton.blocks for path, module in block.linears.items()}
    shapes = {path: (name(path), module.out_features, module.in_features) for path, module in linears.items()}
    stored_bits = {path: 8 * stored_bytes(skeleton, checkpoint, f"{name(path)}.weight") for path in linears}
    inputs = ACTIVATIONS[settings.activations] if settings.target_bits is None else None
    if inputs is not None:
        layers = {
            path: Layer(label, rows * columns, stored_bits[path], (Candidate(None, stored_bits[path]),))
            for path, (label, rows, columns) in shapes.items()
            if settings.inputs_for(label) is not None and settings.scheme_for(label) is not None
        }
        return Question(layers, (f"inputs {inputs}",), rounding, options, inputs)
    tried = schemes or schemes_to_try(settings, layout)
    if settings.target_bits is not None and layout.one_grid:
        raise ConfigError(
            f"{layout.name} files have one grid for all layers, but --target-bits chooses one for each layer",
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
    """By path, each layer of `shapes` (name, out_features, in_features) that can have one of `schemes`.

    `stored_bits` is the size of each layer in float; the layers of each of the `units` get the same scheme. Raises
    ConfigError for a scheme that the format cannot hold.
    """
    fixed = {path for path, shape in shapes.items() if _fixed_by_user(shape[0], settings)}
    fixed.update(path for unit in units if fixed.intersection(unit) for path in unit)
    free = {path: shape for path, shape in shapes.items() if path not in fixed}
    units = [unit for unit in units if not fixed.intersection(unit)]
    if not free:
        raise ConfigError(
            "no layer is left for --target-bits: --skip and --override match all of them",
            hint="use fewer --skip and --override patterns",
        )

    @functools.cache
    def packed_bits(rows: int, columns: int, scheme: WeightScheme) -> int:
        return _packed_bits(rows, columns, scheme, layout, scale_dtype)

    by_scheme = []
    for scheme in schemes:
        plain = settings.replace(preset=None, scheme=scheme, overrides=(), target_bits=None)
        plans = dict(zip(free, plan_layers(free.values(), plain, layout), strict=True))
        by_scheme.append(alike(plans, units, plain, layout))
    layers = {}
    for path, (name, rows, columns) in free.items():
        schemes_of_layer = [plans[path].scheme.weights for plans in by_scheme]
        choices = tuple(
            Candidate(scheme, packed_bits(rows, columns, scheme) if scheme else stored_bits[path])
            for scheme in schemes_of_layer
        )
        if any(choice.scheme is not None for choice in choices):
            layers[path] = Layer(name, rows * columns, stored_bits[path], choices)
    return layers


def _require_reachable(layers: Iterable[Layer], target: float) -> None:
    """Raise ConfigError for a target below the size of the smallest grids."""
    measured = list(layers)
    smallest = sum(min(choice.bits for choice in layer.candidates) for layer in measured)
    least = smallest / sum(layer.weights for layer in measured)
    if least > target:
        raise ConfigError(
            f"the target is {target:g} bits per weight, but the smallest grids take {least:.3f}, including scales",
            hint=f"give {math.ceil(100 * least) / 100:.2f} or more, or add a smaller grid: --bits 3",
        )


def spend(measured: Sensitivity, target: float) -> Spending:
    """The assignment with the least predicted KL and at most `target` bits per weight; ConfigError if impossible."""
    weights = sum(unit.weights for unit in measured.units)
    choices = [
        [*(Choice(effect.bits, effect.kl) for effect in unit.effects), Choice(unit.float_bits, 0.0)]
        for unit in measured.units
    ]
    indices = allocate(choices, int(target * weights))
    spent = [choices_of_unit[index] for choices_of_unit, index in zip(choices, indices, strict=True)]
    grids = tuple(None if index == len(measured.grids) else measured.grids[index] for index in indices)
    return Spending(target, sum(s.bits for s in spent) / weights, sum(s.loss for s in spent), grids, measured.units)


def settled(settings: QuantConfig, plan: Spending) -> QuantConfig:
    """The settings with the assignment: an override or a skip for each layer that differs from `settings.scheme`.

    Their `target_bits` is None.
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
    if scheme.floats is not None:
        return Override(pattern=pattern, bits=scheme.floats)
    return Override(pattern=pattern, bits=scheme.bits, group_size=scheme.group_size)


def _patterns(unit: Unit, units: Iterable[Unit]) -> tuple[str, ...]:
    """Patterns that match only the layers of a unit: their names, or one pattern for the experts of a layer."""
    if len(unit.names) < MANY:
        return unit.names
    prefix = os.path.commonprefix(unit.names).rpartition(".")[0]
    others = (name for other in units if other is not unit for name in other.names)
    return unit.names if not prefix or any(name.startswith(f"{prefix}.") for name in others) else (f"{prefix}.*",)


def _fixed_by_user(name: str, settings: QuantConfig) -> bool:
    """Whether a --skip or an --override of the grid matches a layer."""
    grids = [o.pattern for o in settings.overrides if (o.bits, o.group_size, o.symmetric) != (None, None, None)]
    return any(matches(pattern, name) for pattern in (*settings.skip, *grids))


def _packed_bits(rows: int, columns: int, scheme: WeightScheme, layout: Layout, scale_dtype: torch.dtype) -> int:
    """The size of a weight in the format, found by packing an empty one: some formats add further tensors."""
    packed = layout.pack(QuantizedTensor.blank(rows, columns, scheme, scale_dtype))
    return sum(8 * tensor.nbytes for tensor in packed.values())
