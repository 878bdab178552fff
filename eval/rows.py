"""A table in a JSON file that grows row by row: a killed run loses only the current row, and can be continued."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return rows


def append(file: Path, row: Row) -> None:
    """Append a row atomically; the file is read again each time, because another run may write to it."""
    rows = [*read(file), row]
    unfinished = file.with_suffix(f".{os.getpid()}")
    lines = ",\n".join(json.dumps(entry) for entry in rows)
    unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    unfinished.replace(file)
