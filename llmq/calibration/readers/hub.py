"""A data set on the Hub, streamed: NAME[:CONFIG][:SPLIT][:COLUMN]."""

import itertools
from pathlib import Path

from llmq.calibration import readers
from llmq.calibration.documents import Contents, documents_of
from llmq.errors import CalibrationError

SUFFIXES: tuple[str, ...] = ()


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return not Path(source).is_file()


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`.  A local folder of data files works as a name, too."""
    hint = f"give a file that ends in {readers.suffixes()}"
    hint += "" if explicit else ", such as --calibration text.txt, or let the model write: --calibration self"
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{source} is no local file, and reading the Hub's data sets needs the package datasets",
            hint=f"pip install datasets, or {hint}",
        ) from None
    parts = [part or None for part in source.split(":")]
    if len(parts) > 4:
        raise CalibrationError(f"{source} has {len(parts)} parts, expected at most four: name:config:split:column")
    name, config, split, column = [*parts, None, None, None][:4]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        return Contents(documents_of(list(itertools.islice(rows, limit)), source, column), continuous=True)
    except CalibrationError:
        raise
    except Exception as error:  # the library and its many transports raise a type of their own for everything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = (
            f"the data set {source} cannot be read"
            if explicit
            else "no calibration text was given, and the Hub's cannot be had"
        )
        raise CalibrationError(f"{what}: {reason}", hint=hint) from error
