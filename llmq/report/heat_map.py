"""A picture of how much each layer suffers: blocks from left to right, kinds of layers and grids from top to bottom.

matplotlib draws it, which comes with the extra `plots`.
"""

import importlib.util
import math
from pathlib import Path

from llmq.errors import ConfigError, StorageError
from llmq.report.sensitivity import Sensitivity

CELL_INCHES, LABEL_INCHES, MARGIN_INCHES = 0.28, 4.2, 1.2
SMALLEST = 1e-9  # of what is told apart from nothing: the logarithm of 0 has no colour


def require_drawable(file: Path) -> None:
    """Raise ConfigError where matplotlib is not installed, or cannot write such a file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot was asked for, and matplotlib is not installed", hint="pip install 'llmq[plots]'")
    from matplotlib.figure import Figure

    if file.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise ConfigError(f"{file} is of no kind that can be drawn", hint="end the name with .png or .svg")


def cells(found: Sensitivity) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows, columns and the KL of each cell; not a number where a block has no such layers."""
    blocks = list(dict.fromkeys(unit.block for unit in found.units))
    kinds = dict.fromkeys(unit.label for unit in found.units)
    rows = [(kind, grid) for kind in kinds for grid in found.grids]
    kl = {(unit.label, effect.grid, unit.block): effect.kl for unit in found.units for effect in unit.effects}
    values = [[kl.get((kind, grid, block), math.nan) for block in blocks] for kind, grid in rows]
    return [f"{kind}  {grid}" for kind, grid in rows], [block.rpartition(".")[2] for block in blocks], values


def draw(found: Sensitivity, file: Path) -> None:
    """Write the picture; the suffix of `file` says in which format.  Raises ConfigError, StorageError."""
    require_drawable(file)
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns, values = cells(found)
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
