"""Charts as coordinates: the template of the report draws them as SVG, with the colors of the page.

All values are at least 0, and every axis starts at 0. A value that is not known leaves a gap.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 220  # of the drawing, in units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 70, 10, 12, 34  # margins of the plot
TICKS, LABELS = 4, 12  # about as many ticks, and at most as many labels of the x axis

Values = Sequence[float | None]


@dataclass(frozen=True)
class Mark:
    """A point of a line, or a bar that ends there: its place, and the words that a browser shows for it."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Series:
    """One line or one set of bars; `parts` are the coordinates of lines without gaps."""

    name: str
    marks: tuple[Mark, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """title, x_title  in words; ticks, labels  the place and the text of each; bar  the width of a bar, 0 for lines."""

    title: str
    x_title: str
    series: tuple[Series, ...]
    ticks: tuple[tuple[float, str], ...]
    labels: tuple[tuple[float, str], ...]
    bar: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str,
    x_title: str,
    labels: Sequence[str],
    values: Mapping[str, Values],
    form: Callable[[float], str],
    *,
    bars: bool = False,
) -> Chart | None:
    """A chart of one or several series of values, one per label; None if no value is known."""
    known = [value for own in values.values() for value in own if value is not None and math.isfinite(value)]
    if not known:
        return None
    step = _step(max(known))
    top = step * max(1, math.ceil(max(known) / step))
    space = (WIDTH - LEFT - RIGHT) / len(labels)

    def x(index: int) -> float:
        return round(LEFT + (index + 0.5) * space, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top, 1)

    series = []
    for name, own in values.items():
        marks: list[Mark | None] = [
            Mark(x(i), y(value), f"{labels[i]}: {form(value)}")
            if value is not None and math.isfinite(value) else None
            for i, value in enumerate(own)
        ]  # fmt: skip
        series.append(Series(name, tuple(mark for mark in marks if mark is not None), tuple(_parts(marks))))
    ticks = tuple((y(step * n), form(step * n)) for n in range(round(top / step) + 1))
    every = math.ceil(len(labels) / LABELS)
    shown = tuple((x(i), labels[i]) for i in range(0, len(labels), every))
    return Chart(title, x_title, tuple(series), ticks, shown, round(0.8 * space, 2) if bars else 0)


def _step(largest: float) -> float:
    """The distance of ticks: 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return 1.0
    exact = largest / TICKS
    power = 10.0 ** math.floor(math.log10(exact))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= exact * (1 - 1e-9))


def _parts(marks: Sequence[Mark | None]) -> list[str]:
    """The coordinates of each run of points without a gap."""
    parts: list[list[str]] = [[]]
    for mark in marks:
        if mark is None:
            parts.append([])
        else:
            parts[-1].append(f"{mark.x},{mark.y}")
    return [" ".join(part) for part in parts if part]
