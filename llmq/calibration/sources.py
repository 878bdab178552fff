"""Where the text comes from: how sources and their weights are written; `readers/` has a file per kind of source.

    text.txt   data/chats.jsonl   data/rows.parquet:body        a local file, of rows also by column
    allenai/c4:en:train:text                                    a data set on the Hub: name[:config][:split][:column]
    self                                                        the model itself
    a.jsonl:0.5   allenai/c4:en:0.3   self:0.2                  each with a weight: a number at the end

A number at the end is always a weight: a configuration that is called 2024 is written with a colon more, `name:2024:`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmq.calibration import readers
from llmq.calibration.documents import Contents, is_blank, texts_only
from llmq.errors import CalibrationError

SELF = "self"
HUB_DOCUMENTS = 4_000  # read from a streamed data set before the seed chooses among them
DEFAULT_SOURCES = ("allenai/c4:en:train:text", "HuggingFaceFW/fineweb-edu:sample-10BT:train:text")

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


def read_source(source: str, *, explicit: bool = True, limit: int = HUB_DOCUMENTS) -> Contents:
    """Everything that one source holds; raises CalibrationError where it cannot be read, or all documents are blank."""
    reader = next((reader for reader in readers.readers() if reader.is_meant(source)), None)
    if reader is None:
        raise CalibrationError(f"{source} is no kind of file that is read", hint=f"expected {readers.suffixes()}")
    contents = reader.read(source, limit=limit, explicit=explicit)
    if all(is_blank(document) for document in contents.documents):
        raise CalibrationError(f"{source} holds no text", hint="expected text, or rows with a column named text")
    return contents


def read_documents(source: str) -> list[str]:
    """The texts of one source, blank ones left out; raises CalibrationError where there is none."""
    documents = [document for document in read_source(source).documents if not is_blank(document)]
    return texts_only(documents, source)
