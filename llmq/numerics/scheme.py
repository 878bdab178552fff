"""How a linear layer is quantized: `Scheme`, made of a `WeightScheme` and an `InputScheme`.

A name such as W8A8 or W4A16 gives the bits of the weights and of the inputs ("activations"); 16 stands for float.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmq.errors import ConfigError, listed
from llmq.numerics.gguf_types import BLOCK_TYPES

GroupSize = int | Literal["channel", "tensor"]

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # 16 * 2**n: what packed layouts and kernels tile by
INPUT_SCALES = {"int8": ("dynamic", "static"), "fp8": ("dynamic", "static"), "nvfp4": ("local",)}


@dataclass(frozen=True)
class FloatGrid:
    """A grid of small floats.

    type    in `llmq_kernels/value_tables.py`
    levels  the largest code of this type
    rows    that share a scale
    """

    bits: int
    group_size: GroupSize
    type: str
    levels: int
    rows: int = 1


FLOAT_GRIDS = {
    "nvfp4": FloatGrid(4, 16, "e2m1", 14),
    "mxfp4": FloatGrid(4, 32, "e2m1", 14),
    "fp8": FloatGrid(8, "channel", "e4m3", 252),
    "fp8-block": FloatGrid(8, 128, "e4m3", 252, rows=128),
}


@dataclass(frozen=True)
class WeightScheme:
    """The affine grid of one weight: w = scale * (code - zero), codes (quantized values) in [0, 2**bits - 1].

    `group_size` columns of a row share a scale; "channel" is one scale per row, "tensor" one for the whole weight.
    A symmetric grid has its zero point fixed at 2**(bits - 1); an asymmetric grid has one zero point per group.
    `block_type` is set for the grid of a block type of GGUF (`numerics/gguf_types.py`), and `floats` for one of
    `FLOAT_GRIDS` (`numerics/float_grid.py`), whose codes stand for small floats; both fix the other fields.
    """

    bits: int = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    block_type: str | None = None
    floats: str | None = None

    @classmethod
    def of_blocks(cls, block_type: str) -> "WeightScheme":
        """The grid of a block type: `q4_k`, …"""
        kind = BLOCK_TYPES[block_type]
        return cls(kind.bits, kind.group, kind.symmetric, block_type)

    @classmethod
    def of_floats(cls, name: str, **given: Any) -> "WeightScheme":
        """One of `FLOAT_GRIDS`; raises ConfigError for another name, and for `given` fields that the grid fixes."""
        if name not in FLOAT_GRIDS:
            raise ConfigError(
                f"bits is {name!r}, expected one of {listed((*BITS, *FLOAT_GRIDS))}", hint="the usual choice is 4"
            )
        grid = FLOAT_GRIDS[name]
        fixed = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": True}
        for field, value in given.items():
            if value != fixed[field]:
                raise ConfigError(
                    f"{field} is {value!r}, but {name} has {field} {fixed[field]}", hint=f"leave {field} out"
                )
        return cls(grid.bits, grid.group_size, floats=name)

    def __post_init__(self) -> None:
        if self.floats is not None:
            grid = FLOAT_GRIDS.get(self.floats)
            fields = (self.bits, self.group_size, self.symmetric, self.block_type)
            if grid is None or fields != (grid.bits, grid.group_size, True, None):
                raise ConfigError(
                    f"{self.bits} bits in groups of {self.group_size} are not the grid {self.floats}",
                    hint=f"give bits alone: {listed(FLOAT_GRIDS)}, or bits and a group size of integers",
                )
            return
        if self.block_type is not None:
            kind = BLOCK_TYPES.get(self.block_type)
            if kind is None or (self.bits, self.group_size, self.symmetric) != (kind.bits, kind.group, kind.symmetric):
                raise ConfigError(
                    f"{self!r} is not the grid of a block type",
                    hint=f"use WeightScheme.of_blocks with one of {listed(BLOCK_TYPES)}",
                )
            return
        if type(self.bits) is not int or self.bits not in BITS:  # 4.0 is in BITS too, but not an int
            raise ConfigError(f"bits is {self.bits!r}, expected one of {listed(BITS)}", hint="the usual choice is 4")
        if type(self.group_size) not in (int, str) or self.group_size not in (*GROUP_SIZES, "channel", "tensor"):
            raise ConfigError(
                f"group size is {self.group_size!r}, expected one of {listed(GROUP_SIZES)}, channel or tensor",
                hint="the usual choice is 128; channel is one scale per row, tensor one scale per weight",
            )
        if type(self.symmetric) is not bool:
            raise ConfigError(f"symmetric is {self.symmetric!r}, expected true or false")

    @property
    def levels(self) -> int:
        """The largest code, 2**bits - 1; of small floats the number of values - 1."""
        return (1 << self.bits) - 1 if self.floats is None else FLOAT_GRIDS[self.floats].levels

    @property
    def table(self) -> str | None:
        """The name of the values that codes stand for (`llmq_kernels/value_tables.py`); None for integers."""
        if self.floats is not None:
            return FLOAT_GRIDS[self.floats].type
        return None if self.block_type is None else BLOCK_TYPES[self.block_type].table

    @property
    def few_scales(self) -> bool:
        """Whether scales are small floats, too, so that most real numbers are far from any."""
        return self.floats in ("nvfp4", "mxfp4")

    @property
    def rows_per_scale(self) -> int:
        """How many rows share their scales, if not all do: 128 in blocks of fp8, elsewhere 1."""
        return 1 if self.floats is None else FLOAT_GRIDS[self.floats].rows

    @property
    def shares_rows(self) -> bool:
        """Whether rows share scales, so that no scale can be changed for one row alone."""
        return self.group_size == "tensor" or self.rows_per_scale > 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """How many input columns share a scale, in a weight with `in_features` columns."""
        return self.group_size if isinstance(self.group_size, int) else in_features

    @property
    def two_level(self) -> bool:
        """Whether scales are small integers times a shared number (`quantized_tensor.Superblocks`)."""
        return self.block_type is not None and BLOCK_TYPES[self.block_type].two_level

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        return (
            self.floats
            or self.block_type
            or f"int{self.bits} {grouping} {'symmetric' if self.symmetric else 'asymmetric'}"
        )


SPREAD = {"dynamic": "dynamic per token", "static": "static per tensor", "local": "dynamic per 16"}


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of a linear layer are quantized before they are multiplied by its weights.

    dtype   "int8", "fp8" (float8_e4m3fn) or "nvfp4", all symmetric around zero
    scales  "dynamic": one scale per token, computed at run time; "static": one scale for the whole tensor, fixed by
            calibration; "local", of nvfp4: one scale per 16 inputs of a token, computed at run time as E4M3 divided by
            a global scale, which is fixed by calibration
    scale   the static or the global scale of one layer; None before calibration, and for dynamic scales
    """

    dtype: Literal["int8", "fp8", "nvfp4"] = "int8"
    scales: Literal["dynamic", "static", "local"] = "dynamic"
    scale: float | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("dtype", tuple(INPUT_SCALES)), ("scales", INPUT_SCALES.get(self.dtype, ()))):
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(
                    f"{field} of an input scheme is {value!r}, expected one of {listed(allowed)}",
                    hint="InputScheme('int8', 'dynamic') is the usual choice",
                )
        if self.scale is not None and not (self.calibrated and 0 < self.scale < math.inf):
            raise ConfigError(
                f"scale of an input scheme is {self.scale!r} with {self.scales} scales, expected a positive number "
                "with static and local scales, or none",
                hint="leave it out: it is measured on the calibration text",
            )

    @property
    def calibrated(self) -> bool:
        """Whether a number of each layer is measured on text, and stored in the file."""
        return self.scales != "dynamic"

    @property
    def declared(self) -> "InputScheme":
        """The scheme as a configuration declares it for many layers: without the scale of one layer."""
        return replace(self, scale=None)

    def __str__(self) -> str:
        return f"{self.dtype} {SPREAD[self.scales]}"


ACTIVATIONS: Mapping[str, InputScheme | None] = {
    "none": None,
    "int8": InputScheme("int8", "dynamic"),
    "int8:static": InputScheme("int8", "static"),
    "fp8": InputScheme("fp8", "dynamic"),
    "fp8:static": InputScheme("fp8", "static"),
    "nvfp4": InputScheme("nvfp4", "local"),
}
"""The values of `--activations`."""


@dataclass(frozen=True)
class Scheme:
    """What of a linear layer is quantized: its weights, its inputs, both, or nothing.

    None stands for float.  W4A16 is `Scheme(WeightScheme(4))`, W8A8 is `Scheme(WeightScheme(8, "channel"),
    InputScheme("int8"))`.
    """

    weights: WeightScheme | None = None
    inputs: InputScheme | None = None

    def __post_init__(self) -> None:
        for field, kind in (("weights", WeightScheme), ("inputs", InputScheme)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(
                    f"{field} of a scheme is {value!r}, expected {kind.__name__} or None",
                    hint="for example Scheme(WeightScheme(8, 'channel'), InputScheme('int8', 'dynamic'))",
                )

    @property
    def scales_are_products(self) -> bool:
        """Whether kernels compute scales of groups as products (`scale_products.py`): few bits, inputs in fp8."""
        weights, inputs = self.weights, self.inputs
        return weights is not None and inputs is not None and weights.bits <= 4 and inputs.dtype == "fp8"

    def __str__(self) -> str:
        if self.inputs is None:
            return str(self.weights or "float")
        return f"{self.weights or 'float'}, inputs {self.inputs}"
