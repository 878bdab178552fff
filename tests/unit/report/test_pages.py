"""The report for people: complete without other files, readable, escaped, and equal to report.json."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from llmq.errors import CheckpointError
from llmq.report import pages
from llmq.report.charts import chart
from llmq.report.forecast import Forecast, StageTime
from llmq.report.page import Page, page_of
from llmq.report.record import (
    BlockReport,
    ExpertTokens,
    LayerReport,
    Report,
    StageGain,
    StageSummary,
    TuningReport,
)
from llmq.report.stored_record import read_report, write_record
from llmq.report.verdict import Continuation, Verdict
from tests.command_line import llmq

ROOT = Path(__file__).resolve().parents[3]
EVIL = "<script>alert('x')</script>\"&{{ 7 * 7 }}\x1b\x00"
VOID = {"meta", "br", "link", "img"}


def layer(block: int, name: str, error: float) -> LayerReport:
    gains = (StageGain("target", 1.2, 1.1, True), StageGain("descent", 1.0, 0.9, True))
    return LayerReport(
        f"model.layers.{block}.{name}", "int4 g32 symmetric", 4.5, error, error, 512, 0.01, (f"note {EVIL}",), gains,
        weight_outlier=5.5, activation_outlier=20.0, scales=((-9, 3), (-7, 12)),
        rtn_error=1.5 * error,
    )  # fmt: skip


def report(blocks: int = 3) -> Report:
    verdict = Verdict(
        f"a sentence {EVIL}", 0.0123, (0.01, 0.02), 0.05, (0.2, 0.3), 8.1, 8.2, 0.93, 0.8, 4096, f"text of {EVIL}",
        "awq", continuations=(Continuation(f"prompt {EVIL}", f"original {EVIL}", f"quantized {EVIL}"),), notes=(EVIL,),
    )  # fmt: skip
    parts = [
        BlockReport(
            f"model.layers.{index}", (layer(index, "q_proj", 0.02), layer(index, f"mlp.{EVIL}", 0.05)), (EVIL,), 1.5,
            host_bytes=10**9, device_bytes=2 * 10**9,
        )
        for index in range(blocks)
    ]  # fmt: skip
    source = {"source": EVIL, "share": 1.0, "windows": 8, "sha256": "cd", "read": 7, "characters_per_token": 3.5}
    text = {"samples": 8, "seqlen": 64, "sha256": "ab", "sources": [EVIL], "notes": [EVIL], "manifest": [source]}
    settings = {"method": EVIL, "calibration": {"sources": [EVIL]}}
    return Report(
        source=EVIL, output=EVIL, settings=settings, versions={"llmq": EVIL}, calibration=text,
        blocks=parts, tuning=TuningReport(10, 5, ((0, 0.2), (5, 0.1))), left={EVIL: "outside the blocks"}, notes=[EVIL],
        stages=[StageSummary("descent", 3, 6, -0.1)], experts=[ExpertTokens(EVIL, 8, 0, 12.5, 100, 2)],
        sizes={"awq": 10**6}, verdict=verdict, command=f"llmq quantize {EVIL}",
        forecast=Forecast((StageTime("quantizing", 12.5, 345.25), StageTime(EVIL, 1.0, 2.0)), 3 * 10**9, 4 * 10**9),
    )  # fmt: skip


class Checked(HTMLParser):
    """Collects tags, ids and headings; fails for tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return pages.html(page_of(report()))


def test_the_page_needs_no_other_file_and_runs_no_script(text: str) -> None:
    checked = Checked(text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in checked.tags}
    assert not [name for _, attributes in checked.tags for name in attributes if name in ("src", "href", "style")]
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"http-equiv", "", text)


def test_everything_from_the_record_is_escaped(text: str) -> None:
    assert "<script" not in text and "alert('x')" not in text and "&amp;49" not in text
    assert text.count("&lt;script&gt;") > 15
    assert "\x1b" not in text and "\x00" not in text and "\N{REPLACEMENT CHARACTER}" in text


def test_charts_and_tables_have_labels(text: str) -> None:
    checked = Checked(text)
    charts = [svg for svg in checked.of("svg") if svg.get("aria-hidden") != "true"]
    assert len(charts) >= 8 and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert text.count("<figcaption>") == text.count("<figure>") == len(charts)
    assert all(cell.get("scope") in ("row", "col") for cell in checked.of("th"))
    assert checked.of("html") == [{"lang": "en"}] and len(checked.of("h1")) == 1
    ids = [attributes["id"] for _, attributes in checked.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in checked.of("section")} == set(ids)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in checked.of("meta")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_have_enough_contrast_in_every_style(text: str) -> None:
    """As WCAG 2.2 AA requires: 4.5 for text, 3 for lines and bars."""
    styles = [dict(re.findall(r"--(\w+): (#\w{6})", line)) for line in re.findall(r":root \{.*?\}", text)]
    assert len(styles) == 3  # light, dark, print
    for style in styles:
        for back in (style["back"], style["box"]):
            for name, least in {"text": 4.5, "muted": 4.5, "s1": 3.0, "s2": 3.0, "s3": 3.0}.items():
                dark, light = sorted((luminance(style[name]), luminance(back)))
                assert (light + 0.05) / (dark + 0.05) >= least, (name, style)


def test_an_unfinished_run_is_read_again_and_a_finished_one_is_not(text: str) -> None:
    unfinished = pages.html(page_of(replace(report(), verdict=None), total=8))
    assert 'id="again"' in unfinished and "3 of 8 blocks" in unfinished
    assert 'id="again"' not in text
    Checked(pages.html(page_of(replace(report(0), calibration=None, verdict=None, stages=[], experts=[], tuning=None))))


def test_the_page_compares_the_forecast_with_what_was_measured(text: str) -> None:
    cells = re.sub(r"\s*<[^>]+>\s*", "|", text)
    assert "|quantizing|12 s|6 min|" in re.sub(r"\|+", "|", cells)
    assert "|peak GPU memory|4.00 GB|2.00 GB|" in re.sub(r"\|+", "|", cells)
    assert "median, round to nearest" in text and "7.50 %" in text
    assert "what was measured" not in pages.html(page_of(replace(report(), forecast=None)))


def test_large_models_have_small_pages() -> None:
    large = report(126)
    many = [layer(0, f"mlp.experts.{expert}.up_proj", 0.01) for expert in range(3000)]
    large.blocks[0] = replace(large.blocks[0], layers=tuple(many))
    assert len(pages.html(page_of(large))) < 1_000_000


def test_report_json_has_the_committed_schema() -> None:
    committed = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert committed == json.loads(json.dumps(pages.schema())), "run python scripts/docs.py"
    page = page_of(report())
    values = json.loads(json.dumps(pages.contents(page)))
    assert TypeAdapter(Page).validate_python(values) == page
    assert values.keys() == committed["properties"].keys() and set(committed["required"]) == values.keys()


def test_the_files_are_made_from_the_record(tmp_path: Path) -> None:
    written = report()
    write_record(tmp_path, written.to_dict())
    assert read_report(tmp_path) == written
    made = {name: (tmp_path / name).read_bytes() for name in (pages.HTML, pages.JSON, pages.CSV)}
    rows = list(csv.DictReader((tmp_path / pages.CSV).read_text().splitlines()))
    assert [row["name"] for row in rows] == [one.name for one in written.layers]
    assert rows[0]["loss_after_descent"] == "0.9" and float(rows[0]["output_error"]) == 0.02
    for name in made:
        (tmp_path / name).unlink()
    outcome = llmq("report", tmp_path)
    assert outcome.exit_code == 0, outcome.stderr
    assert {name: (tmp_path / name).read_bytes() for name in made} == made


@pytest.mark.parametrize("change", [{"source": 3}, {"blocks": [{"layers": []}]}, {"verdict": {"kl": "x"}}])
def test_a_damaged_record_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "llmq.json").write_text(json.dumps({**report().to_dict(), **change}))
    with pytest.raises(CheckpointError, match="not a record of llmq"):
        read_report(tmp_path)
    assert llmq("report", tmp_path).exit_code == 3


def test_a_chart_starts_at_zero_and_has_round_ticks() -> None:
    drawn = chart("t", "x", ["a", "b", "c"], {"s": [0.3, None, 2.9]}, str)
    assert drawn is not None and [words for _, words in drawn.ticks] == ["0.0", "1.0", "2.0", "3.0"]
    assert [mark.words for mark in drawn.series[0].marks] == ["a: 0.3", "c: 2.9"]
    assert len(drawn.series[0].parts) == 2  # a gap between the two
    assert drawn.ticks[0][0] == drawn.bottom
    assert chart("t", "x", ["a"], {"s": [None]}, str) is None
