"""A table that grows row by row in a JSON file: a killed run loses the row it was at, and is continued."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return rows


def append(file: Path, row: Row) -> None:
    """All at once or not at all; read anew each time, as another run may be writing."""
    rows = [*read(file), row]
    unfinished = file.with_suffix(f".{os.getpid()}")
    lines = ",\n".join(json.dumps(each) for each in rows)
    unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    unfinished.replace(file)
