"""Bars of the speed of models in engines, drawn with matplotlib, which the extra `plots` installs."""

from collections.abc import Sequence
from pathlib import Path

from llmq.engines.speed import Measured
from llmq.errors import StorageError
from llmq.report.heat_map import require_drawable

WIDTH, HEIGHT, MARGIN = 10.0, 0.5, 1.2  # inches; the height is that of one bar


def draw(results: Sequence[Measured], file: Path) -> None:
    """Write two panels of bars, from the smallest to the largest value each. Raises ConfigError, StorageError."""
    require_drawable(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, MARGIN + HEIGHT * len(results)), layout="constrained")
    names = [f"{result.model}\n{result.engine}" for result in results]
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        figures = [getattr(result, kind) for result in results]
        medians = [value.median for value in figures]
        below = [value.median - value.smallest for value in figures]
        above = [value.largest - value.median for value in figures]
        axes.barh(range(len(names)), medians, xerr=[below, above], capsize=3)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("tokens per second")
        axes.set_title(kind)
    figure.axes[0].invert_yaxis()  # the first model at the top; the panels share the axis
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from None
