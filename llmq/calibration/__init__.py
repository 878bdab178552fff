"""Text into token windows: what the model reads while it is watched, and what it is judged on.

A source is a local file, a data set on the Hub, or `self`: the model writes its own text, and nothing needs to be at
hand.  Several are mixed by weight.  The way of a text:

    sources.py        how sources and their weights are written
    readers/          the documents of a source, one file per kind of source (chats.py knows chats)
    sequences.py      documents into windows: tokenized as in serving, joined, cut, never padded
    self_written.py   the model's own text (calibration/cache.py keeps it until the run is over)
    mixture.py        windows of all sources, by their weights: `load`
    manifest.py       what was read, and what became of it
"""

from llmq.calibration.cache import OwnText
from llmq.calibration.documents import texts_only
from llmq.calibration.files import paragraphs, read_text
from llmq.calibration.manifest import CalibrationSet, SourceRecord, sha256_of
from llmq.calibration.mixture import Author, load
from llmq.calibration.self_written import SelfAuthor
from llmq.calibration.sequences import cut
from llmq.calibration.sources import DEFAULT_SOURCES, read_documents, read_source

__all__ = [
    "DEFAULT_SOURCES",
    "Author",
    "CalibrationSet",
    "OwnText",
    "SelfAuthor",
    "SourceRecord",
    "cut",
    "load",
    "paragraphs",
    "read_documents",
    "read_source",
    "read_text",
    "sha256_of",
    "texts_only",
]
