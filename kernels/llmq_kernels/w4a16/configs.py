"""Tile sizes of the GPU kernel by number of rows and shape of the weight: data, in `configs.json` or a user's file.

    {"format": 1, "measured": null,
     "same_as": {"120": "89"},                   an architecture that uses the table of another one
     "architectures": {"90": {
        "crossover": 768,                        above this many rows: dequantize, then cuBLAS
        "chunk_bytes": 16777216,                 of dequantized weight at a time
        "default": [{"max_rows": 8, "min_features": 8192, "block_m": 8, ...}, ..., {"max_rows": 768, ...}],
        "shapes": {"4096x4096": [...]}}}}        out_features x in_features, measured; `default` for all others

A choice is for up to max_rows rows of x and at least min_features rows of W (0 if not given); the first that fits is
used.  "measured" is null for tables chosen by reasoning; `tune.py` writes hardware, date and versions there, and
microseconds into each choice.  A GPU whose architecture has no table uses that of the nearest lower architecture.
LLMQ_W4A16_CONFIGS names a file whose architectures take precedence over the shipped ones.  Nothing is tuned while a
model runs.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from llmq_kernels.errors import KernelInputError

VARIABLE = "LLMQ_W4A16_CONFIGS"
FORMAT = 1
SCALE = ("after", "before")
MOST_SPLITS = 16
TILES_PER_SPLIT = 2  # tiles of 128 columns, at least: with fewer, start and end dominate a program


@dataclass(frozen=True)
class Config:
    """One way to run the fused kernel.

    block_m, block_n  rows of x and rows of W in an output tile
    warps, stages     of a program; stages is how many tiles of 128 columns are in flight
    ctas_per_sm       K is split until there are about this many programs per multiprocessor; 0 never splits
    scale             "after" the dot (of exact integers), or "before" (the weight rounded once to x's dtype)
    prefetch          scales and zero points are prefetched some tiles ahead
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    ctas_per_sm: float
    scale: str
    prefetch: bool = True

    def splits(self, M: int, N: int, K: int, processors: int) -> int:
        """How many programs share an output tile of an M x N x K product on this number of multiprocessors."""
        output_tiles = max(1, -(-M // self.block_m) * -(-N // self.block_n))
        wanted = int(self.ctas_per_sm * processors / output_tiles + 0.5)
        return max(1, min(wanted, -(-K // 128) // TILES_PER_SPLIT, MOST_SPLITS))


@dataclass(frozen=True)
class Choice:
    """`config` is for up to `max_rows` rows of x, and weights of at least `min_features` rows."""

    max_rows: int
    config: Config
    min_features: int = 0

    def fits(self, M: int, N: int) -> bool:
        return M <= self.max_rows and N >= self.min_features


@dataclass(frozen=True, eq=False)  # compared by identity, so that hashing it is cheap
class Table:
    """The configurations of one architecture; choices ascend in max_rows, then descend in min_features."""

    crossover: int
    chunk_bytes: int
    default: tuple[Choice, ...]
    shapes: Mapping[tuple[int, int], tuple[Choice, ...]]

    def config(self, M: int, N: int, K: int) -> Config:
        """For M rows; above the last choice, the last choice."""
        choices = self.shapes.get((N, K), self.default)
        return next((choice.config for choice in choices if choice.fits(M, N)), choices[-1].config)


def for_architecture(architecture: int) -> Table:
    """The table for compute capability major * 10 + minor: the user's if there is one, else the shipped one."""
    path = os.environ.get(VARIABLE)
    if path:
        try:
            from_user = read(Path(path).read_text(encoding="utf-8"), path)
        except OSError as error:
            raise KernelInputError(f"{VARIABLE} names a file that cannot be read: {error}") from error
        if architecture in from_user:
            return from_user[architecture]
    tables = shipped()
    return tables[architecture] if architecture in tables else tables[_nearest(architecture, list(tables))]


def shipped() -> dict[int, Table]:
    """The tables in the package."""
    file = resources.files("llmq_kernels.w4a16").joinpath("configs.json")
    return read(file.read_text(encoding="utf-8"), "configs.json")


def read(text: str, name: str) -> dict[int, Table]:
    """The tables by architecture in a JSON text; raises KernelInputError with `name` for anything else."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise KernelInputError(f"{name}: found format {content['format']!r}, expected {FORMAT}")
        tables = {int(number): _table(entry) for number, entry in content["architectures"].items()}
        return tables | {int(number): tables[int(like)] for number, like in content.get("same_as", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, KernelInputError):
            raise
        raise KernelInputError(
            f"{name}: not a table of W4A16 configurations ({type(error).__name__}: {error})"
        ) from error


def _table(entry: Mapping[str, Any]) -> Table:
    def shape(text: str) -> tuple[int, int]:
        N, K = text.split("x")
        return int(N), int(K)

    shapes = {shape(text): _choices(choices) for text, choices in entry["shapes"].items()}
    return Table(int(entry["crossover"]), int(entry["chunk_bytes"]), _choices(entry["default"]), shapes)


def _choices(entries: list[dict[str, Any]]) -> tuple[Choice, ...]:
    known = {field.name for field in fields(Config)}
    choices = tuple(
        Choice(
            int(entry["max_rows"]),
            Config(**{name: entry[name] for name in known if name in entry}),
            int(entry.get("min_features", 0)),
        )
        for entry in entries
    )
    order = [(choice.max_rows, -choice.min_features) for choice in choices]
    if order != sorted(set(order)) or not choices or choices[-1].min_features:
        raise ValueError("max_rows does not ascend, min_features does not descend, or the last choice has min_features")
    for entry, choice in zip(entries, choices, strict=True):
        _check(entry.keys() - known - {"max_rows", "min_features", "microseconds"}, choice.config)
    return choices


def _check(unknown: set[str], config: Config) -> None:
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    blocks = config.block_m >= 8 and config.block_n >= 16 and config.stages >= 1
    powers = all(value & value - 1 == 0 for value in (config.block_m, config.block_n, config.warps))
    if not blocks or not powers or config.warps < 1 or config.scale not in SCALE:
        raise ValueError(f"no kernel can run {config}")


def _nearest(architecture: int, known: list[int]) -> int:
    return max((number for number in known if number <= architecture), default=min(known))
