"""Local files: detect and read them."""

from collections.abc import Sequence
from pathlib import Path

from llmq.calibration import readers
from llmq.errors import CalibrationError

PARAGRAPHS_AT_LEAST = 2_000  # characters: a .txt file is cut at blank lines into documents of this size


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
    """Read a file as text; raises CalibrationError if it cannot be read or is not UTF-8."""
    require_file(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example with iconv -t utf-8",
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None


def paragraphs(text: str) -> list[str]:
    """Split a long text at blank lines into documents of at least `PARAGRAPHS_AT_LEAST` characters."""
    documents, gathered, length = [], [], 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        length += len(paragraph)
        if length >= PARAGRAPHS_AT_LEAST:
            documents.append("\n\n".join(gathered))
            gathered, length = [], 0
    if gathered:
        documents.append("\n\n".join(gathered))
    return documents
