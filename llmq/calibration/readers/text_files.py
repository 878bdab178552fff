"""Plain text: FILE.txt, cut into documents at blank lines, or by length where there are none."""

from llmq.calibration import files
from llmq.calibration.documents import Contents, Document
from llmq.errors import CalibrationError

SUFFIXES = (".txt",)


def is_meant(source: str) -> bool:
    """See `Reader.is_meant`."""
    return files.is_file_name(source, SUFFIXES)


def read(source: str, *, limit: int, explicit: bool) -> Contents:
    """See `Reader.read`."""
    path, column = files.split_column(source, SUFFIXES)
    if column is not None:
        raise CalibrationError(f"{path} is plain text and has no column {column}", hint=f"give {path}")
    text = files.read_text(path)
    return Contents([Document(piece, f"piece {number}") for number, piece in enumerate(files.pieces(text))], text=text)
