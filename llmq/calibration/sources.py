"""Read text sources; `readers/` has one file per kind of source, and `source_names.py` says how they are named."""

from pathlib import Path

from llmq.calibration import readers
from llmq.calibration.documents import Contents, is_blank, texts_only
from llmq.errors import CalibrationError

HUB_DOCUMENTS = 4_000  # documents of a streamed dataset from which the seed chooses


def read_source(source: str, *, explicit: bool = True, limit: int = HUB_DOCUMENTS) -> Contents:
    """Read one source; raises CalibrationError if it cannot be read, or all its documents are blank."""
    reader = next((reader for reader in readers.readers() if reader.is_meant(source)), None)
    if reader is None:
        raise CalibrationError(f"{source} is not a supported type of file", hint=f"expected {readers.suffixes()}")
    contents = reader.read(source, limit=limit, explicit=explicit)
    if all(is_blank(document) for document in contents.documents):
        raise CalibrationError(f"{source} holds no text", hint="expected text, or rows with a column named text")
    return contents


def read_documents(source: str) -> list[str]:
    """Read the texts of one source without blank ones; raises CalibrationError if there are none."""
    documents = [document for document in read_source(source).documents if not is_blank(document)]
    return texts_only(documents, source)


def without_folder(source: str) -> str:
    """The name of a source; of a local file only its name is published."""
    return Path(source).name if Path(source).is_absolute() else source
