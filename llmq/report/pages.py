"""Write the report of a run: `report.html` for people, `report.json` and `layers.csv` for scripts.

`report.html` is one file without references, so it opens anywhere and can be sent; only that of an unfinished run has a
script, which reads it again. Its charts are drawn by
the template (`report.html.j2`) as SVG, whose colors follow the light or dark style of the page. Everything that comes
from a checkpoint is escaped. `PAGE_SCHEMA` is the JSON schema of `report.json`, stored in docs/report.schema.json.
"""

import csv
import functools
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2
from pydantic import TypeAdapter

from llmq.checkpoint import PAGE_FILES
from llmq.checkpoint.atomic import replacing, write_text
from llmq.checkpoint.json_text import json_text
from llmq.report.charts import Chart, chart
from llmq.report.page import Page, page_of
from llmq.report.record import Report
from llmq.report.shown import duration, megabytes
from llmq.report.verdict import change

HTML, JSON, CSV = PAGE_FILES
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
RENEWED = 5.0  # seconds between two versions of the report of an unfinished run
REFRESH = 10  # seconds after which a browser reads it again

COLUMNS = ("name", "scheme", "bits_per_weight", "weight_error", "output_error", "rtn_error", "tokens", "borrowed",
           "damping", "weight_outlier", "activation_outlier", "existing_grid")  # fmt: skip


def write(folder: Path, report: Report) -> None:
    """Write the three files of a finished run into the folder of the model."""
    page = page_of(report)
    write_text(folder / HTML, html(page))
    write_text(folder / JSON, json_text(contents(page)))
    write_text(folder / CSV, layers_csv(report))


class LiveReport:
    """`report.html` of an unfinished run of `total` blocks, written now and renewed at most every few seconds.

    A finished run has another one in the folder of the model. `file` is None for all but the first of several
    processes, which write nothing.
    """

    def __init__(self, file: Path | None, report: Report, total: int) -> None:
        self._file, self._report, self._total = file, report, total
        self._written = -RENEWED
        self.renew()

    def renew(self) -> None:
        now = time.monotonic()
        if self._file is not None and now - self._written >= RENEWED:
            self._written = now
            with replacing(self._file, durable=False) as file:
                file.write(html(page_of(self._report, total=self._total)).encode("utf-8"))


def html(page: Page) -> str:
    """The page as HTML."""
    rows = {"cost": _cost(page), "forecast": _forecast(page), "settings": list(_flat(page.settings))}
    return _template().render(page=page, charts=_charts(page), rows=rows, refresh=REFRESH)


def contents(page: Page) -> dict[str, Any]:
    """The page as plain values that JSON can hold."""
    values: dict[str, Any] = _adapter().dump_python(page, mode="json")
    return values


def schema() -> dict[str, Any]:
    """The JSON schema of `contents`."""
    return _adapter().json_schema(mode="serialization")


def layers_csv(report: Report) -> str:
    """One row per layer; a column per stage has the validation loss after it, or nothing if it was undone."""
    stages = list(dict.fromkeys(gain.stage for layer in report.layers for gain in layer.gains))
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*COLUMNS, *(f"loss_after_{stage}" for stage in stages)])
    for layer in report.layers:
        after = {gain.stage: gain.after for gain in layer.gains if gain.kept}
        rows.writerow([*(getattr(layer, column) for column in COLUMNS), *(after.get(stage) for stage in stages)])
    return file.getvalue()


def _charts(page: Page) -> dict[str, Chart | None]:
    """The charts of the page; None for those without values."""
    blocks, numbers = page.blocks, [str(index) for index in range(len(page.blocks))]

    def by_block(
        title: str, form: Callable[[float], str], fields: Mapping[str, str], *, bars: bool = False
    ) -> Chart | None:
        values = {name: list(map(attrgetter(field), blocks)) for name, field in fields.items()}
        known = {name: own for name, own in values.items() if any(value is not None for value in own)}
        return chart(title, "block", numbers, known, form, bars=bars)

    device = {"GPU memory": "device_bytes"} if any(block.device_bytes for block in blocks) else {}
    errors = {"largest": "largest_error", "median": "median_error", "median, round to nearest": "median_rtn_error"}
    losses = {"after rounding": "rounded", "after refinement": "refined"}
    history = page.tuning.history if page.tuning is not None else ()
    experts, bins = page.experts, page.scales
    tokens = {"median": [entry.median for entry in experts], "minimum": [float(entry.minimum) for entry in experts]}
    return {
        "errors": by_block("Errors by block", _percent, errors),
        "refined": by_block("Validation loss by block", _short, losses),
        "weight_outliers": by_block("Weight outliers by block", _short, {"largest": "weight_outlier"}),
        "activation_outliers": by_block("Activation outliers by block", _short, {"largest": "activation_outlier"}),
        "seconds": by_block("Seconds by block", _short, {"seconds": "seconds"}, bars=True),
        "memory": by_block("Peak memory by block", megabytes, {"main memory": "host_bytes", **device}),
        "tuning": chart(
            "KL divergence by step of end-to-end tuning", "step", [str(step) for step, _ in history],
            {"validation KL": [loss for _, loss in history]}, _short,
        ),
        "scales": chart(
            "Number of scales by size", "power of two", [str(entry.exponent) for entry in bins],
            {"scales": [float(entry.count) for entry in bins]}, _short, bars=True,
        ),
        "experts": chart(
            "Calibration tokens per expert", "layer", [str(index) for index in range(len(experts))], tokens, _short,
        ),
    }  # fmt: skip


def _cost(page: Page) -> list[tuple[str, str]]:
    """Rows of the table of sizes and costs; those that are only known at the end are missing before."""
    rows = [("size of weights, original", megabytes(page.original_bytes))]
    if page.finished:
        rows += [
            ("size of weights, quantized", megabytes(page.file_bytes)),
            *((f"size as {name}", megabytes(size)) for name, size in page.sizes.items()),
            ("bits per weight, with scales", f"{page.bits_per_weight:.3f}"),
            ("time", duration(page.seconds)),
            ("peak main memory", megabytes(page.peak_memory_bytes)),
        ]
    if page.verdict is not None and page.verdict.kl is not None:
        rows.append(("time of the measurement", duration(page.verdict.seconds)))
    return rows


def _forecast(page: Page) -> list[tuple[str, str, str]]:
    """Rows of what was expected and what was measured; nothing before the end, or if there was no forecast."""
    forecast = page.forecast
    if forecast is None or not page.finished:
        return []
    rows = [(stage.stage, duration(stage.expected), duration(stage.measured)) for stage in forecast.stages]
    expected, measured = (sum(map(attrgetter(name), forecast.stages)) for name in ("expected", "measured"))
    rows.append(("all stages", duration(expected), duration(measured)))
    rows.append(("peak main memory", megabytes(forecast.host_bytes), megabytes(page.peak_memory_bytes)))
    if forecast.device_bytes:
        used = max((block.device_bytes for block in page.blocks), default=0)
        rows.append(("peak GPU memory", megabytes(forecast.device_bytes), megabytes(used)))
    return rows


def _flat(settings: Mapping[str, Any], table: str = "") -> Iterator[tuple[str, str]]:
    """The settings as rows; keys of tables get the name of the table as a prefix."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{table}{key}.")
        else:
            yield f"{table}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@functools.cache
def _adapter() -> TypeAdapter[Page]:
    return TypeAdapter(Page)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmq.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_visible,
    )  # fmt: skip
    environment.filters |= {"size": megabytes, "change": change}
    return environment.get_template("report.html.j2")


def _visible(value: object) -> object:
    """Control characters, which HTML does not allow, become the replacement character; markup is not changed."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
