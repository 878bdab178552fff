"""Rows of JSON: FILE.jsonl or FILE.json, each one list of rows or one row per line; FILE:COLUMN selects a column.

The contents decide which it is, because both names are used for both. A list of texts per column, as pandas and Arrow
write tables, is also read. A line that is not valid JSON is one unusable row.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmq.calibration import files
from llmq.calibration.chats import is_chat
from llmq.calibration.documents import BYTE_ORDER_MARK, CHATS, Contents, Row, column_of, contents_of, numbered
from llmq.errors import CalibrationError

SUFFIXES = (".jsonl", ".json")


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return files.is_file_name(source, SUFFIXES)


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`."""
    path, column = files.split_column(source, SUFFIXES)
    text = files.read_text(path)
    value = _parsed(text)
    if isinstance(value, list) and not is_chat(value):
        return contents_of(numbered(value), str(path), column)
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not isinstance(value, CalibrationError):
        return contents_of(_rows(lines[0][0], value, column), str(path), column)
    values = [(name, _parsed(line.removeprefix(BYTE_ORDER_MARK))) for name, line in lines]
    if path.suffix == ".json" and all(isinstance(line, CalibrationError) for _, line in values):
        raise CalibrationError(f"{path} {value}")
    return contents_of((row for line in values for row in _rows(*line, column)), str(path), column)


def _rows(name: str, value: Any, column: str | None) -> Iterator[Row]:
    """The rows in the value of a line: usually one; several in a list, or in a list per column."""
    if isinstance(value, list) and value and not is_chat(value):
        yield from ((f"{name}, item {number}", item) for number, item in enumerate(value))
    elif isinstance(value, Mapping) and _is_table(value, column):
        for number, cells in enumerate(zip(*value.values(), strict=False)):
            yield f"{name}, item {number}", dict(zip(value, cells, strict=False))
    else:
        yield name, value


def _is_table(value: Mapping[str, Any], column: str | None) -> bool:
    """Whether an object holds a list for each column, and not one row."""
    name = column_of(value, column)
    cells = value[name] if name else None
    if not cells or not all(isinstance(other, list) and len(other) == len(cells) for other in value.values()):
        return False
    return all(is_chat(cell) or (isinstance(cell, str) and name not in CHATS) for cell in cells)


def _parsed(text: str) -> Any:
    """The value of a JSON text, or the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return CalibrationError(f"is not valid JSON: {error}")
    except RecursionError:
        return CalibrationError("is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return CalibrationError(f"cannot be read as JSON: {error}")
