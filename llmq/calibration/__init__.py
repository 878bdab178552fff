"""Text into token windows: what the model reads while it is watched, and what it is judged on.

A source is a local file, a data set on the Hub, or `self`: the model writes its own text, and nothing needs to be at
hand.  Several are mixed by weight.  The way of a text:

    sources.py        how a source is written, and its documents (files.py reads local ones, chats.py knows chats)
    packing.py        documents into windows: tokenized as in serving, joined, cut, never padded
    self_written.py   the model's own text (calibration/cache.py keeps it until the run is over)
    mixture.py        windows of all sources, by their weights: `load`
    manifest.py       what was read, and what became of it
"""

from llmq.calibration.cache import OwnText
from llmq.calibration.files import LOCAL_SUFFIXES, paragraphs, read_text
from llmq.calibration.manifest import CalibrationSet, SourceRecord, sha256_of
from llmq.calibration.mixture import Author, load
from llmq.calibration.self_written import SelfAuthor
from llmq.calibration.sequences import cut
from llmq.calibration.sources import DEFAULT_SOURCES, read_documents, read_hub_rows

__all__ = [
    "DEFAULT_SOURCES",
    "LOCAL_SUFFIXES",
    "Author",
    "CalibrationSet",
    "OwnText",
    "SelfAuthor",
    "SourceRecord",
    "cut",
    "load",
    "paragraphs",
    "read_documents",
    "read_hub_rows",
    "read_text",
    "sha256_of",
]
