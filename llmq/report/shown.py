"""Results that print themselves: as tables of text, and as HTML in notebooks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmq.report.escaped import html_text, printable

NOTE = "note: {}"


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns (empty if the first column names what is in the second), and rows."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [list(map(_line, row)) for row in ([self.columns] if self.columns else []) + [*self.rows]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (
            [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)]
            for cells in (zip(line, widths, strict=True) for line in lines)
        )
        return "\n".join([_line(self.title), *("  ".join(line).rstrip() for line in padded)])

    def html(self) -> str:
        """The table as HTML, with everything in it escaped."""
        head = "".join(f"<th>{html_text(column)}</th>" for column in self.columns)
        body = (f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><caption>{html_text(self.title)}</caption>{head and f'<tr>{head}</tr>'}{''.join(body)}</table>"


class Shown:
    """A result with `tables` and notes: `print(result)` prints them, and a notebook shows them."""

    def tables(self) -> Iterator[Table]:
        """The tables that show the result."""
        raise NotImplementedError

    def remarks(self) -> Iterable[str]:
        """Notes for the user, shown after the tables."""
        return ()

    def __str__(self) -> str:
        remarks = "\n".join(NOTE.format(_line(note)) for note in self.remarks())
        return "\n\n".join(part for part in (*map(str, self.tables()), remarks) if part)

    def _repr_html_(self) -> str:
        remarks = "".join(f"<p>{html_text(NOTE.format(note))}</p>" for note in self.remarks())
        return "".join(table.html() for table in self.tables() if table.rows) + remarks


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """`4.5 s`, `45 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _line(text: str) -> str:
    return " ".join(printable(str(text)).split())
