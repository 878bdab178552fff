"""The contents of `report.html` and `report.json`: plain values, computed from the record of a run.

Large models have tens of thousands of layers (experts). So layers are grouped by kind and by block here, and only the
layers with the largest errors are listed; `layers.csv` has all of them.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.report.forecast import Forecast
from llmq.report.record import BlockReport, ExpertTokens, LayerReport, Report, StageSummary, TuningReport
from llmq.report.verdict import Verdict

WORST = 20  # layers that are listed
NAMES = 5  # of layers with the same note or reason
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Block:
    """One block: its errors are the output errors of its layers (without calibration text: their weight errors).

    median_rtn_error  the median error of the same layers if they were rounded to nearest; None if it is not known
    rounded, refined  validation loss of its layers after rounding, and after the refinements; None without refinements
    """

    path: str
    layers: int
    median_error: float | None
    largest_error: float | None
    rounded: float | None
    refined: float | None
    median_rtn_error: float | None
    weight_outlier: float | None
    activation_outlier: float | None
    seconds: float
    host_bytes: int
    device_bytes: int
    resumed: bool


@dataclass(frozen=True)
class Kind:
    """The layers whose names differ only in numbers, and that have the same grid."""

    name: str
    scheme: str
    layers: int
    bits_per_weight: float
    median_error: float
    median_rtn_error: float | None
    largest_error: float


@dataclass(frozen=True)
class Layer:
    """One layer of those with the largest errors."""

    name: str
    scheme: str
    error: float
    rtn_error: float | None
    weight_outlier: float | None
    activation_outlier: float | None


@dataclass(frozen=True)
class Bin:
    """The number of scales from 2^(exponent - 1) to 2^exponent."""

    exponent: int
    count: int


@dataclass(frozen=True)
class Named:
    """A note, or a reason to keep a layer in float; the number of layers that it is about, and the first of them."""

    text: str
    layers: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the report shows.

    total       number of blocks (the head counts as one if it is quantized); `blocks` are those that are finished
    calibrated  whether errors are output errors on calibration text, not weight errors
    sizes       the size of each format in bytes, if there are several
    """

    source: str
    output: str
    finished: bool
    total: int
    calibrated: bool
    verdict: Verdict | None
    bits_per_weight: float
    original_bytes: int
    file_bytes: int
    sizes: Mapping[str, int]
    seconds: float
    peak_memory_bytes: int
    blocks: tuple[Block, ...]
    kinds: tuple[Kind, ...]
    worst: tuple[Layer, ...]
    stages: tuple[StageSummary, ...]
    tuning: TuningReport | None
    scales: tuple[Bin, ...]
    experts: tuple[ExpertTokens, ...]
    calibration: Mapping[str, Any] | None
    notes: tuple[Named, ...]
    kept_in_float: tuple[Named, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str | None]
    command: str
    forecast: Forecast | None


def page_of(report: Report, *, total: int | None = None) -> Page:
    """The page of a finished run, or of a run with `total` blocks that is not finished yet."""
    layers = report.layers
    return Page(
        source=report.source,
        output=report.output,
        finished=total is None,
        total=len(report.blocks) if total is None else total,
        calibrated=any(layer.output_error is not None for layer in layers),
        verdict=report.verdict,
        bits_per_weight=report.bits_per_weight,
        original_bytes=report.original_bytes,
        file_bytes=report.file_bytes,
        sizes=report.sizes,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        blocks=tuple(map(_block, report.blocks)),
        kinds=_kinds(layers),
        worst=tuple(
            Layer(
                layer.name, layer.scheme, layer.error, layer.rtn_error, layer.weight_outlier, layer.activation_outlier
            )  # fmt: skip
            for layer in sorted(layers, key=lambda layer: -layer.error)[:WORST]
        ),
        stages=tuple(report.stages),
        tuning=report.tuning,
        scales=_scales(layers),
        experts=tuple(report.experts),
        calibration=report.calibration,
        notes=_notes(report),
        kept_in_float=_named((reason, name) for name, reason in report.left.items()),
        settings=report.settings,
        versions=report.versions,
        command=report.command,
        forecast=report.forecast,
    )


def _block(block: BlockReport) -> Block:
    errors = [layer.error for layer in block.layers]
    rounded, refined = _losses(block.layers)
    return Block(
        path=block.path,
        layers=len(block.layers),
        median_error=statistics.median(errors) if errors else None,
        largest_error=max(errors, default=None),
        rounded=rounded,
        refined=refined,
        median_rtn_error=_median_rtn(block.layers),
        weight_outlier=_largest(block.layers, lambda layer: layer.weight_outlier),
        activation_outlier=_largest(block.layers, lambda layer: layer.activation_outlier),
        seconds=block.seconds,
        host_bytes=block.host_bytes,
        device_bytes=block.device_bytes,
        resumed=block.resumed,
    )


def _median_rtn(layers: Iterable[LayerReport]) -> float | None:
    errors = [layer.rtn_error for layer in layers if layer.rtn_error is not None]
    return statistics.median(errors) if errors else None


def _losses(layers: Sequence[LayerReport]) -> tuple[float | None, float | None]:
    """The validation loss after rounding and after the refinements, summed over the layers that have refinements."""
    refinements = [
        [gain for gain in layer.gains if gain.stage not in ("target", "rotation", "awq", "smooth")] for layer in layers
    ]
    gains = [own for own in refinements if own]
    if not gains:
        return None, None
    after = sum(next((gain.after for gain in reversed(own) if gain.kept), own[0].before) for own in gains)
    return sum(own[0].before for own in gains), after


def _largest(layers: Iterable[LayerReport], value: Callable[[LayerReport], float | None]) -> float | None:
    return max((number for number in map(value, layers) if number is not None), default=None)


def _kinds(layers: Iterable[LayerReport]) -> tuple[Kind, ...]:
    kinds: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault((_NUMBER.sub("*", layer.name), layer.scheme), []).append(layer)
    return tuple(
        Kind(
            name=name,
            scheme=scheme,
            layers=len(own),
            bits_per_weight=statistics.fmean(layer.bits_per_weight for layer in own),
            median_error=statistics.median(layer.error for layer in own),
            median_rtn_error=_median_rtn(own),
            largest_error=max(layer.error for layer in own),
        )
        for (name, scheme), own in kinds.items()
    )


def _scales(layers: Iterable[LayerReport]) -> tuple[Bin, ...]:
    """The scales of all layers by their exponents, without gaps."""
    counts: Counter[int] = Counter()
    for layer in layers:
        counts.update(dict(layer.scales))
    exponents = range(min(counts), max(counts) + 1) if counts else ()
    return tuple(Bin(exponent, counts[exponent]) for exponent in exponents)


def _notes(report: Report) -> tuple[Named, ...]:
    """The notes of the run, of the calibration text, of tuning, of blocks and of layers, each once."""
    alone = [*(report.calibration or {}).get("notes", ()), *report.notes]
    alone += report.tuning.notes if report.tuning is not None else ()
    alone += [note for block in report.blocks for note in block.notes]
    return (
        *(Named(note) for note in dict.fromkeys(map(str, alone))),
        *_named((note, layer.name) for layer in report.layers for note in layer.notes),
    )


def _named(pairs: Iterable[tuple[str, str]]) -> tuple[Named, ...]:
    """(text, name of a layer) grouped by text."""
    names: dict[str, list[str]] = {}
    for text, name in pairs:
        names.setdefault(text, []).append(name)
    return tuple(Named(text, len(own), tuple(own[:NAMES])) for text, own in names.items())
