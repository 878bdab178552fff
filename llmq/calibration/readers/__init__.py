"""Text sources: one file per kind of source, found by its file name.

    text_files.py     FILE.txt
    json_files.py     FILE.jsonl or FILE.json, also FILE:COLUMN
    parquet_files.py  FILE.parquet, also FILE:COLUMN
    hub.py            a dataset on the Hub: NAME[:CONFIG][:SPLIT][:COLUMN]; also reads every source that no other
                      reader takes

Calibration and evaluation use the same readers. The source `self`, text that the model generates, has no documents: see
`self_written.py`.
"""

import importlib
import pkgutil
from typing import Protocol, cast

from llmq.calibration.documents import Contents

LAST = "hub"


class Reader(Protocol):
    """What each file of this folder provides, as a module."""

    SUFFIXES: tuple[str, ...]  # of the files that it reads; empty if the source is not a file

    def is_meant(self, source: str) -> bool:
        """Whether this reader reads a source with this name."""

    def read(self, source: str, *, limit: int, explicit: bool) -> Contents:
        """Read all documents of the source, or the first `limit` of a streamed source.

        `explicit` is False for a default source, which the user did not name.  Raises CalibrationError.
        """


def readers() -> list[Reader]:
    """All readers, in the order in which they are tried."""
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name == LAST, name))
    return [cast(Reader, importlib.import_module(f"{__name__}.{name}")) for name in names]


def suffixes() -> str:
    """The suffixes of all files that are read, for messages."""
    return ", ".join(suffix for reader in readers() for suffix in reader.SUFFIXES)
