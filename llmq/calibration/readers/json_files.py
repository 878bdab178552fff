"""Rows of JSON: FILE.jsonl, one per line, or FILE.json, one list; FILE:COLUMN selects a column."""

import json
from pathlib import Path
from typing import Any

from llmq.calibration import files
from llmq.calibration.documents import Contents, documents_of
from llmq.errors import CalibrationError

SUFFIXES = (".jsonl", ".json")


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return files.is_file_name(source, SUFFIXES)


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`."""
    path, column = files.split_column(source, SUFFIXES)
    text = files.read_text(path)
    rows = _json_lines(text, path) if path.suffix == ".jsonl" else _json(text, str(path))
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a JSON {type(rows).__name__}, expected a list of texts or of objects")
    return Contents(documents_of(rows, str(path), column))


def _json_lines(text: str, path: Path) -> list[Any]:
    """The value of each line that is not blank; only "\n" ends a line, because JSON strings may hold U+2028."""
    lines = enumerate(text.split("\n"), start=1)
    return [_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not valid JSON: {error}") from None
