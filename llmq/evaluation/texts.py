"""Evaluation texts: sequences of tokens, and the document of each token.

Each text is a *stratum*: it is reported separately, and all of them are reported together.

**Sequences** follow the protocol of the published WikiText figures: the rows of the text are joined with blank lines,
tokenized once, and cut into sequences that do not overlap. Texts that consist of documents (.jsonl, .json, .parquet)
are packed like calibration text instead: each document is tokenized separately, with a beginning-of-text token.

**Documents** are what confidence intervals draw (`bootstrap.py`). They are the documents of a file of rows, and the
articles of WikiText. A plain text has no documents; each of its sequences counts as one.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import calibration
from llmq.errors import CalibrationError, ConfigError

HUB_ROWS = 50_000  # the most rows of a Hub data set, including blank ones; the test text of WikiText-2 has 4358
DOCUMENTS, SEQUENCES = "documents", "sequences"  # the units of `EvaluationText`

_NAMED = re.compile(r"(?P<name>[^/\\:=]+)=(?P<source>.+)", re.DOTALL)
# The title of an article in the joined rows of WikiText, with a blank row before and after it.
_ARTICLE = re.compile(r"(?:\A|(?<=\n\n))\n\n(?P<title> = [^=\n]+ = )\n{5}")


@dataclass(frozen=True)
class EvaluationText:
    """A text: `windows` (S, T) int64, and `documents` (S, T) int64, the number of each token's document, from 0.

    name    the name in tables; by default the source
    source  a file or a Hub dataset
    unit    "documents", or "sequences" for a text without documents
    notes   what of the source was left out
    """

    name: str
    source: str
    windows: Tensor
    documents: Tensor
    unit: str = SEQUENCES
    notes: tuple[str, ...] = ()


def named(text: str | Path) -> tuple[str, str]:
    """The name and the source of `NAME=SOURCE`; without a name, the source is the name."""
    match = _NAMED.fullmatch(str(text))
    if match is None or Path(text).exists():
        return str(text), str(text)
    return match["name"].strip(), match["source"]


def read_texts(
    texts: str | Path | Sequence[str | Path], tokenizer: Any, seqlen: int, *, wikitext: bool, limit: int | None
) -> list[EvaluationText]:
    """The evaluation texts, each `SOURCE` or `NAME=SOURCE`; the options are those of `read_text`.

    Raises ConfigError for two texts with the same name.
    """
    sources: dict[str, str] = {}
    for name, source in map(named, [texts] if isinstance(texts, str | Path) else texts):
        if sources.setdefault(name, source) != source:
            raise ConfigError(
                f"two texts have the name {name}: {sources[name]} and {source}", hint="write --text NAME=PATH"
            )
    return [
        read_text(source, tokenizer, seqlen, name=name, wikitext=wikitext, limit=limit)
        for name, source in sources.items()
    ]


def read_text(
    source: str, tokenizer: Any, seqlen: int, *, name: str = "", wikitext: bool = False, limit: int | None = None
) -> EvaluationText:
    """Read an evaluation text: any source of `--calibration` except `self`, and except chats.

    `wikitext` treats the lines of a .txt file as the rows of the WikiText data set: blank lines are emptied, and all
    are joined with blank lines. The rows of a Hub data set are always joined in this way. `limit` is the largest number
    of sequences. Raises CalibrationError.
    """
    contents = calibration.read_source(source, limit=HUB_ROWS)
    texts = calibration.texts_only(contents.documents, source)
    if contents.text is None:
        by_document = [_tokenize(text, tokenizer) for text in texts if text.strip()]
        ids = [token for document in by_document for token in document]
        owners = [number for number, document in enumerate(by_document) for _ in document]
    else:
        text = wikitext_rows(contents.text) if wikitext and Path(source).is_file() else contents.text
        ids, owners = _articles(text, tokenizer)
    windows = calibration.cut(torch.tensor(ids, dtype=torch.int64), seqlen)[:limit]
    if len(windows) == 0:
        raise CalibrationError(
            f"{source} holds {len(ids)} tokens, fewer than one sequence of {seqlen}", hint="lower --seqlen"
        )
    if not owners:
        documents, unit = torch.arange(len(windows))[:, None].expand_as(windows), SEQUENCES
    else:
        documents, unit = calibration.cut(torch.tensor(owners, dtype=torch.int64), seqlen)[:limit], DOCUMENTS
    return EvaluationText(name or source, source, windows, documents, unit, contents.notes(source))


def wikitext_rows(text: str) -> str:
    """The raw WikiText file like the joined rows of the data set: blank lines emptied, rows joined with blank lines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))  # a line ends with "\n" only


def _articles(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids of a continuous text and the article of each token; no articles if it does not have two titles."""
    starts = [match.start("title") for match in _ARTICLE.finditer(text)]
    if len(starts) < 2 or not getattr(tokenizer, "is_fast", False):
        return _tokenize(text, tokenizer), []
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
    begins = torch.tensor([begin for begin, _ in encoded["offset_mapping"]])
    owners = torch.searchsorted(torch.tensor(starts[1:]), begins, right=True)  # what precedes the first title belongs
    ids: list[int] = encoded["input_ids"]  # to the first article
    return ids, owners.tolist()


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
