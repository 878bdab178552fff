"""Calibration text that is given in Python: texts, chats, token ids, or the rows of a `datasets.Dataset`.

It becomes a source with the name `python-` and a digest of its contents, so that a repeated call continues, and the
manifest shows whether two runs had the same text.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmq.calibration.documents import Contents, Document, Tokens, arrow_row, contents_of, digest, is_blank, numbered
from llmq.calibration.readers import readers
from llmq.calibration.sources import HUB_DOCUMENTS
from llmq.errors import CalibrationError
from llmq.source_names import parse_sources

WHERE = "the calibration text given in Python"
ROWS = 20_000  # of a dataset, evenly spaced
TOKEN_COLUMN = "input_ids"
_NAME = re.compile(r"[\w./:~-]{1,300}", re.ASCII)  # of a file without spaces, or of a dataset on the Hub


def from_python(calibration: Any) -> tuple[Any, dict[str, Contents]]:
    """The setting `calibration` of a run, and the contents of its source, unless it names files and datasets.

    A list of strings is a list of names if each one could be a name, else a list of texts. Of a large dataset `ROWS`
    rows are read, and of an iterator without a length the first `HUB_DOCUMENTS`.  Raises CalibrationError for rows that
    hold neither a text, a chat nor token ids.
    """
    if calibration is None or isinstance(calibration, str | Path):
        return calibration, {}
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, expected names of files and datasets, or a list of texts",
            hint="of a DatasetDict give one split, such as dataset['train']",
        )
    rows = _rows(calibration)
    if all(isinstance(row, str | Path) and _is_name(str(row)) for row in rows):
        return rows, {}
    contents = contents_of(numbered(map(_row, rows)), WHERE, None)
    if all(is_blank(document) for document in contents.documents):
        raise CalibrationError(f"{WHERE} is empty", hint="give texts, chats, or lists of token ids")
    return (name := _name(contents.documents)), {name: contents}


def _rows(calibration: Any) -> list[Any]:
    if not hasattr(calibration, "__len__"):
        return list(itertools.islice(calibration, HUB_DOCUMENTS))
    count = len(calibration)
    if hasattr(calibration, "column_names") and count > ROWS:  # a `datasets.Dataset`, which may be on disk
        calibration = calibration.select(range(0, count, -(-count // ROWS)))
    return list(calibration)


def _row(row: Any) -> Any:
    """The row as a reader gives it; token ids as `Tokens`."""
    value = row.get(TOKEN_COLUMN, row) if isinstance(row, Mapping) else row
    plain = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    if (
        isinstance(plain, Sequence)
        and not isinstance(plain, str)
        and plain
        and all(type(item) is int for item in plain)
    ):
        if min(plain) < 0:
            return CalibrationError(f"holds the token id {min(plain)}, expected ids of at least 0")
        return Tokens(tuple(plain))
    return arrow_row(row) if isinstance(row, Mapping) else row


def _is_name(text: str) -> bool:
    """Whether a string could be the name of a source, as in a list of names."""
    if "\n" in text or len(text) > 4096:
        return False
    names = [source.name for source in parse_sources([text])]
    files = [reader for reader in readers() if reader.SUFFIXES]
    return all(
        _NAME.fullmatch(name) or any(reader.is_meant(name) for reader in files) or Path(name).is_file()
        for name in names
    )


def _name(documents: Iterable[Document]) -> str:
    whole = hashlib.sha256()
    for document in documents:
        whole.update(digest(document.content))
    return f"python-{whole.hexdigest()[:16]}"
