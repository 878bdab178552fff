"""The figures of docs/QUANTIZATION.md: the script draws them, and the page shows them."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "figures.py"))
LARGEST = 50_000  # bytes


def texts(file: Path) -> list[str]:
    """All texts of a figure."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text("utf-8"))


@pytest.mark.parametrize("name", SCRIPT["FIGURES"])
def test_the_script_draws_the_figure(name: str, tmp_path: Path) -> None:
    """Numbers and labels are those of the results; shapes depend on the version of matplotlib."""
    kept = PICTURES / f"{name}.svg"
    assert texts(SCRIPT["draw"](name, tmp_path)) == texts(kept) != []
    assert kept.stat().st_size < LARGEST


def test_the_page_shows_each_figure_with_its_description() -> None:
    page = (ROOT / "docs" / "QUANTIZATION.md").read_text("utf-8")
    shown = dict(re.findall(r"!\[(.+)\]\(pictures/([\w-]+)\.svg\)", page))
    assert set(shown.values()) == set(SCRIPT["FIGURES"]) and min(map(len, shown)) > 40
