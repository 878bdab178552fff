"""Rows of a table: FILE.parquet; FILE:COLUMN selects a column."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq.calibration import files
from llmq.calibration.documents import COLUMNS, Contents, Row, arrow_row, contents_of
from llmq.errors import CalibrationError

SUFFIXES = (".parquet",)


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return files.is_file_name(source, SUFFIXES)


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`."""
    path, column = files.split_column(source, SUFFIXES)
    files.require_file(path)
    return contents_of(_rows(_table(path, column)), str(path), column)


def _table(path: Path, column: str | None) -> Any:
    """The columns of the file that may be needed; all columns if it has none of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(
            f"{path} needs pyarrow to be read", hint="pip install 'llmq-quantize[datasets]'"
        ) from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = set(names).intersection([column] if column else COLUMNS)
        return pyarrow.parquet.read_table(path, columns=sorted(wanted | {"tools"} & set(names)) if wanted else None)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from None


def _rows(table: Any) -> Iterator[Row]:
    """Each row is converted separately, so that a text which is not UTF-8 is one unusable row."""
    number = 0
    for batch in table.to_batches():
        for cells in zip(*batch.columns, strict=True):
            name = f"row {number}"
            number += 1
            try:
                row = {key: cell.as_py() for key, cell in zip(table.column_names, cells, strict=True)}
            except ValueError as error:
                yield name, CalibrationError(f"cannot be read: {error}")
            else:
                yield name, arrow_row(row)
