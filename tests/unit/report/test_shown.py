"""Results that print themselves and show as HTML."""

from collections.abc import Iterator
from html.parser import HTMLParser

from llmq.report.shown import Shown, Table, duration, megabytes

EVIL = "<img src=x onerror=alert(1)>\x1b[2K|&"


class Result(Shown):
    def tables(self) -> Iterator[Table]:
        yield Table(f"of {EVIL}", [("a", "1"), (EVIL, "200")], ("name", "value"))
        yield Table("empty", [])

    def remarks(self) -> list[str]:
        return [EVIL]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.names.add(tag)
        assert attrs == []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_result_prints_aligned_tables_and_notes() -> None:
    shown = str(Result()).replace(EVIL.replace("\x1b", "\\x1b"), "EVIL")
    width = len(EVIL.replace("\x1b", "\\x1b"))
    assert shown.splitlines()[:2] == ["of EVIL", f"{'name':{width}}  value"]
    assert shown.splitlines()[2].split() == ["a", "1"]
    assert "\x1b" not in shown and shown.endswith("note: EVIL")


def test_html_has_tables_and_nothing_of_strangers() -> None:
    tags = Tags()
    tags.feed(Result()._repr_html_())
    assert tags.names == {"table", "caption", "tr", "th", "td", "p"}
    assert tags.text.count("<img src=x onerror=alert(1)>\\x1b[2K|&") == 3


def test_units() -> None:
    assert [megabytes(2_500_000), megabytes(3.2e9)] == ["2.50 MB", "3.20 GB"]
    assert [duration(4.5), duration(45), duration(720), duration(12_600)] == ["4.5 s", "45 s", "12 min", "3.5 h"]
