"""Text into token sequences, for calibration and for evaluation.

A source is a local file, a dataset on the Hub, or `self`: text that the model generates. Several sources are mixed by
weight. In the order of processing:

    sources.py        read sources; their names and weights are in source_names.py
    readers/          read the documents of a source, one file per kind of source (chats: chats.py)
    sequences.py      documents into sequences: tokenized as in serving, never padded
    drawing.py        which tokens become sequences: drawn from many documents, or joined end to end
    self_written.py   text that the model generates (calibration/cache.py keeps it until the run is finished)
    mixture.py        sequences of all sources, by their weights: `load`
    manifest.py       what was read and used of each source
    read_again.py     the text of a finished run, to compare it with an evaluation text
"""

from llmq.calibration.cache import OwnText
from llmq.calibration.documents import texts_only
from llmq.calibration.files import read_text
from llmq.calibration.manifest import CalibrationSet, SourceRecord, sha256_of
from llmq.calibration.mixture import Author, load
from llmq.calibration.self_written import SelfAuthor
from llmq.calibration.sequences import cut
from llmq.calibration.sources import read_documents, read_source
from llmq.source_names import DEFAULT_SOURCES

__all__ = [
    "DEFAULT_SOURCES",
    "Author",
    "CalibrationSet",
    "OwnText",
    "SelfAuthor",
    "SourceRecord",
    "cut",
    "load",
    "read_documents",
    "read_source",
    "read_text",
    "sha256_of",
    "texts_only",
]
