"""Where text comes from: one file per kind of source, found by its file name.

    text_files.py     FILE.txt
    json_files.py     FILE.jsonl or FILE.json, also FILE:COLUMN
    parquet_files.py  FILE.parquet, also FILE:COLUMN
    hub.py            a data set on the Hub: NAME[:CONFIG][:SPLIT][:COLUMN]; the reader of every source that no other
                      reader takes

Calibration and evaluation read with the same readers.  The source `self`, text that the model writes, has no documents
to read: see `self_written.py`.
"""

import importlib
import pkgutil
from typing import Protocol, cast

from llmq.calibration.documents import Contents

LAST = "hub"


class Reader(Protocol):
    """What each file of this folder provides, as a module."""

    SUFFIXES: tuple[str, ...]  # of the files that it reads; none where the source is not a file

    def is_meant(self, source: str) -> bool:
        """Whether a source written like this is one for this reader."""

    def read(self, source: str, *, limit: int, explicit: bool) -> Contents:
        """Everything that the source holds; of one without an end the first `limit` documents.

        `explicit` is False for a default source, which the user did not name.  Raises CalibrationError.
        """


def readers() -> list[Reader]:
    """All readers, in the order in which they are asked."""
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name == LAST, name))
    return [cast(Reader, importlib.import_module(f"{__name__}.{name}")) for name in names]


def suffixes() -> str:
    """The suffixes of all files that are read, for messages."""
    return ", ".join(suffix for reader in readers() for suffix in reader.SUFFIXES)
