"""A heat map of the sensitivity of each layer: blocks from left to right, layers and grids from top to bottom.

It is drawn with matplotlib, which the extra `plots` installs.
"""

import importlib.util
import math
from pathlib import Path

from llmq.errors import ConfigError, StorageError
from llmq.report.sensitivity import Sensitivity

CELL_INCHES, LABEL_INCHES, MARGIN_INCHES = 0.28, 4.2, 1.2
SMALLEST = 1e-9  # smaller values get the same colour, because 0 has no logarithm


def require_drawable(file: Path) -> None:
    """Raise ConfigError if matplotlib is not installed or cannot write this type of file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed", hint="pip install 'llmq-quantize[plots]'")
    from matplotlib.figure import Figure

    if file.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise ConfigError(f"{file} is not a supported type of picture", hint="end the name with .png or .svg")


def cells(sensitivity: Sensitivity) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows, columns and the KL divergence of each cell; NaN if a block has no such layers."""
    blocks = list(dict.fromkeys(unit.block for unit in sensitivity.units))
    kinds = dict.fromkeys(unit.label for unit in sensitivity.units)
    rows = [(kind, grid) for kind in kinds for grid in sensitivity.grids]
    kl = {(unit.label, effect.grid, unit.block): effect.kl for unit in sensitivity.units for effect in unit.effects}
    values = [[kl.get((kind, grid, block), math.nan) for block in blocks] for kind, grid in rows]
    return [f"{kind}  {grid}" for kind, grid in rows], [block.rpartition(".")[2] for block in blocks], values


def draw(sensitivity: Sensitivity, file: Path) -> None:
    """Write the heat map in the format given by the suffix of `file`. Raises ConfigError, StorageError."""
    require_drawable(file)
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns, values = cells(sensitivity)
    size = (LABEL_INCHES + CELL_INCHES * len(columns) + MARGIN_INCHES, MARGIN_INCHES + CELL_INCHES * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    present = [value for row in values for value in row if value > SMALLEST] or [SMALLEST, 1.0]
    norm = LogNorm(min(present), max(present))
    image = axes.imshow(
        [[max(value, min(present)) for value in row] for row in values], norm=norm, aspect="auto", cmap="viridis"
    )
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xlabel("block")
    figure.colorbar(image, label="KL, nats per token")
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from None
