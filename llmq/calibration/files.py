"""Local files: detect and read them."""

import re
from collections.abc import Sequence
from pathlib import Path

from llmq.calibration import readers
from llmq.errors import CalibrationError

SHORTEST_PIECE = 2_000  # characters of a document that is cut from a .txt file
LONGEST = 4  # times the shortest piece
GAPS = tuple(map(re.compile, (r"\n(?:[ \t]*\n)+", r"\n", r"\s")))  # where a text is cut, the best place first


def is_file_name(source: str, suffixes: Sequence[str]) -> bool:
    """Whether a source is written as FILE or FILE:COLUMN with one of these suffixes; the file need not exist.

    Any other name with a colon is a dataset on the Hub.
    """
    path, column = split_column(source, suffixes)
    return path.suffix in suffixes and (path.exists() or column is not None or ":" not in source)


def split_column(source: str, suffixes: Sequence[str]) -> tuple[Path, str | None]:
    """Split `rows.jsonl:column` into file and column; an existing file may have a colon in its name."""
    head, _, column = source.rpartition(":")
    if Path(source).exists() or Path(head).suffix not in suffixes or not column:
        return Path(source), None
    return Path(head), column


def require_file(path: Path) -> None:
    """Raise CalibrationError if there is no such file."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise CalibrationError(
            f"{path} {problem}, expected a file", hint=f"give a file that ends in {readers.suffixes()}"
        )


def read_text(path: Path) -> str:
    """Read a file as text, without a byte order mark and with `\\n` as line ends.

    Raises CalibrationError if it cannot be read or is not UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example with iconv -t utf-8",
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None


def pieces(text: str, shortest: int = SHORTEST_PIECE) -> list[str]:
    """Cut a long text into consecutive pieces of at least `shortest` characters, and at most `LONGEST` times as many.

    A piece ends at a blank line; if it would be too long, at a line end, at a space, or in the middle of a word. The
    blank space between two pieces is left out.
    """
    cut, start = [], 0
    while start < len(text):
        longest = start + LONGEST * shortest
        gaps = GAPS if longest < len(text) else GAPS[:1]
        matches = (gap.search(text, start + shortest, longest) for gap in gaps)
        end, following = next((match.span() for match in matches if match), (longest, longest))
        cut.append(text[start:end])
        start = following
    return cut
