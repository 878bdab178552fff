"""A dataset on the Hub, streamed: NAME[:CONFIG][:SPLIT][:COLUMN]."""

import dataclasses
import itertools
from pathlib import Path

from llmq.calibration import readers
from llmq.calibration.documents import Contents, arrow_row, contents_of, numbered
from llmq.errors import CalibrationError

SUFFIXES: tuple[str, ...] = ()


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return not Path(source).is_file()


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`.  A local folder of data files also works as a name."""
    hint = f"give a file that ends in {readers.suffixes()}"
    hint += "" if explicit else ", such as --calibration text.txt, or let the model generate text: --calibration self"
    try:
        import datasets
    except ImportError:
        what = f"{source} is not a local file" if explicit else "no calibration text was given"
        raise CalibrationError(
            f"{what}, and reading datasets from the Hub needs the package datasets",
            hint=f"pip install 'llmq-quantize[datasets]', or {hint}",
        ) from None
    parts = [part or None for part in source.split(":")]
    if len(parts) > 4:
        raise CalibrationError(f"{source} has {len(parts)} parts, expected at most four: name:config:split:column")
    name, config, split, column = [*parts, None, None, None][:4]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        contents = contents_of(numbered(map(arrow_row, itertools.islice(rows, limit))), source, column)
    except CalibrationError:
        raise
    except Exception as error:  # the library and its transports raise many types of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = (
            f"the dataset {source} cannot be read"
            if explicit
            else "no calibration text was given, and the default text on the Hub cannot be read"
        )
        raise CalibrationError(f"{problem}: {reason}", hint=hint) from error
    texts = [document.content for document in contents.documents if isinstance(document.content, str)]
    joined = "\n\n".join(texts) if len(texts) == len(contents.documents) else None
    return dataclasses.replace(contents, text=joined)
