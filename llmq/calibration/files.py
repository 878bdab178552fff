"""Local files as rows: a .txt file cut into documents, .json, .jsonl and .parquet as they are."""

import json
from pathlib import Path
from typing import Any

from llmq.errors import CalibrationError

LOCAL_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PARAGRAPHS_AT_LEAST = 2_000  # characters: a .txt file is cut at blank lines into documents of this size


def read_rows(path: Path) -> list[Any]:
    """What a file holds, a text or an object a row; raises CalibrationError where it cannot be read."""
    if not path.is_file():
        raise CalibrationError(f"{path} is not a file", hint=f"expected one that ends in {', '.join(LOCAL_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    text = read_text(path)
    if path.suffix == ".txt":
        return paragraphs(text)
    rows = _json_lines(text, path) if path.suffix == ".jsonl" else _json(text, str(path))
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a JSON {type(rows).__name__}, expected a list of texts or of objects")
    return rows


def read_text(path: Path) -> str:
    """A file as text; raises CalibrationError where it cannot be read or is not UTF-8."""
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
    """A long text as documents: cut at blank lines, each at least `PARAGRAPHS_AT_LEAST` characters long."""
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


def _json_lines(text: str, path: Path) -> list[Any]:
    """The value of each line that is not blank; only "\n" ends a line, as JSON strings may hold U+2028 and its like."""
    lines = enumerate(text.split("\n"), start=1)
    return [_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not valid JSON: {error}") from None


def _parquet_rows(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path} needs pyarrow to be read", hint="pip install pyarrow") from None
    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from None
    return rows
