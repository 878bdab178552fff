"""Rows of a table: FILE.parquet; FILE:COLUMN selects a column."""

from pathlib import Path
from typing import Any

from llmq.calibration import files
from llmq.calibration.documents import Contents, documents_of
from llmq.errors import CalibrationError

SUFFIXES = (".parquet",)


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return files.is_file_name(source, SUFFIXES)


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`."""
    path, column = files.split_column(source, SUFFIXES)
    files.require_file(path)
    return Contents(documents_of(_parquet_rows(path), str(path), column))


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
