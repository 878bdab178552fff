"""Where the text comes from: how a source is written, and the documents that it holds.

    text.txt   data/chats.jsonl   data/rows.parquet:body        a local file, of rows also by column
    allenai/c4:en:train:text                                    a data set on the Hub: name[:config][:split][:column]
    self                                                        the model itself
    a.jsonl:0.5   allenai/c4:en:0.3   self:0.2                  each with a weight: a number at the end

A number at the end is always a weight: a configuration that is called 2024 is written with a colon more, `name:2024:`.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.calibration.chats import Chat, parse_chat
from llmq.calibration.files import LOCAL_SUFFIXES, read_rows
from llmq.errors import CalibrationError

SELF = "self"
COLUMNS = ("text", "content", "messages", "conversations", "completion", "question")  # the first that a row has
HUB_DOCUMENTS = 4_000  # read from a streamed data set before the seed chooses among them
DEFAULT_SOURCES = ("allenai/c4:en:train:text", "HuggingFaceFW/fineweb-edu:sample-10BT:train:text")

Document = str | Chat

_WEIGHT = re.compile(r"(?P<name>.+):(?P<weight>\d+\.?\d*|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One source by its name, without the weight that it was given; the weights of a mixture need not add up to 1."""

    name: str
    weight: float = 1.0
    explicit: bool = True  # named by the user

    @property
    def is_self(self) -> bool:
        return self.name == SELF


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """The sources of a run, the default ones where none was named.

    One text may hold several with their weights, separated by blanks: `a.txt:0.5 self:0.5`.
    """
    if not texts:
        return [Source(name, explicit=False) for name in DEFAULT_SOURCES]
    return [_parse(part) for text in texts for part in _parts(text)]


def _parts(text: str) -> list[str]:
    parts = text.split()
    several = len(parts) > 1 and all(_WEIGHT.fullmatch(part) for part in parts) and not Path(text).exists()
    return parts if several else [text]


def _parse(text: str) -> Source:
    found = _WEIGHT.fullmatch(text)
    if found is None or Path(text).exists():
        return Source(text)
    weight = float(found["weight"])
    if not 0 < weight < math.inf:
        raise CalibrationError(f"the weight of {text} is {found['weight']}, expected more than 0", hint="leave it out")
    return Source(found["name"], weight)


def read_documents(source: str, *, explicit: bool = True) -> list[str]:
    """The texts of one source, blank ones left out; raises CalibrationError where there is none."""
    documents = [document for document in read_source(source, explicit=explicit) if not is_blank(document)]
    return _texts_only(documents, source)


def read_source(source: str, *, explicit: bool = True) -> list[Document]:
    """All that one source holds, blank documents too; raises CalibrationError where all are."""
    path, column = _split_column(source)
    if path.suffix in LOCAL_SUFFIXES and (path.exists() or column is not None or ":" not in source):
        if column is not None and path.suffix == ".txt":
            raise CalibrationError(f"{path} is plain text, and has no column {column}", hint=f"give {path}")
        documents = _column(read_rows(path), str(path), column)
    elif path.is_file():
        raise CalibrationError(
            f"{source} is no kind of file that is read", hint=f"expected {', '.join(LOCAL_SUFFIXES)}"
        )
    else:
        documents = _hub_rows(source, HUB_DOCUMENTS, explicit=explicit)
    if all(is_blank(document) for document in documents):
        raise CalibrationError(f"{source} holds no text", hint="expected text, or rows with a column named text")
    return documents


def is_blank(document: Document) -> bool:
    return not (document.contents if isinstance(document, Chat) else document).strip()


def _split_column(source: str) -> tuple[Path, str | None]:
    """`rows.jsonl:column` in two; a file with a colon in its name is a file."""
    head, _, column = source.rpartition(":")
    if Path(source).exists() or Path(head).suffix not in LOCAL_SUFFIXES or not column:
        return Path(source), None
    return Path(head), column


def _column(rows: Sequence[Any], where: str, column: str | None) -> list[Document]:
    """The document of each row: the row itself, or its column."""
    documents: list[Document] = []
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, dict):
            key = column or next((name for name in COLUMNS if name in row), None)
            value = row.get(key) if key else None
        document = value if isinstance(value, str) else parse_chat(value)
        if document is None:
            keys = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            expected = column or " or ".join(COLUMNS)
            raise CalibrationError(
                f"row {number} of {where} holds {keys}, expected a text or the column {expected}",
                hint="a column holds a text, or a chat: a list of messages with role and content, or from and value",
            )
        documents.append(document)
    return documents


def read_hub_rows(source: str, limit: int, *, explicit: bool = True) -> list[str]:
    """The first rows of a data set, blank ones too, as `name[:config][:split][:column]`.

    A local folder of data files works as a name too.  `explicit` is False for a source that the user did not name.
    """
    return _texts_only(_hub_rows(source, limit, explicit=explicit), source)


def _texts_only(documents: Sequence[Document], source: str) -> list[str]:
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise CalibrationError(
            f"{source} holds chats, expected texts", hint="chats are read for calibration; name a column of texts"
        )
    return texts


def _hub_rows(source: str, limit: int, *, explicit: bool) -> list[Document]:
    hint = f"give a file that ends in {', '.join(LOCAL_SUFFIXES)}"
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
        return _column(list(itertools.islice(rows, limit)), source, column)
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
