"""Text into token windows: what the model reads while it is watched, and what it is judged on.

A source is a local .txt, .jsonl, .json or .parquet file, or a data set on the Hub as `name[:config][:split][:column]`.
Each document is tokenized as in serving (the tokenizer adds its beginning-of-text token if it does so there),
documents are joined end to end and cut into windows: nothing is padded, nothing is dropped but the last, incomplete
window.  Which documents come first is drawn from the seed, so that a large file is sampled and not read from the top.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.config import Calibration
from llmq.errors import CalibrationError

TEXT_COLUMNS = ("text", "content", "completion", "question")
LOCAL_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PARAGRAPHS_AT_LEAST = 2_000  # characters: a .txt file is cut at blank lines into documents of this size
HUB_DOCUMENTS = 4_000  # read from a streamed data set before the seed chooses among them
DEFAULT_SOURCES = ("allenai/c4:en:train:text", "HuggingFaceFW/fineweb-edu:sample-10BT:train:text")


@dataclass(frozen=True)
class CalibrationSet:
    """windows (S, T) int64; where they came from; sha256 of the ids; what a user should be told."""

    windows: Tensor
    sources: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        samples, seqlen = self.windows.shape
        return {
            "sources": list(self.sources),
            "samples": samples,
            "seqlen": seqlen,
            "tokens": samples * seqlen,
            "sha256": self.sha256,
            "notes": list(self.notes),
        }


def load(settings: Calibration, tokenizer: Any, *, seed: int, max_tokens: int | None) -> CalibrationSet:
    """The calibration set of a run; `max_tokens` is the model's context, which a window does not exceed."""
    notes: list[str] = []
    seqlen = settings.seqlen
    if max_tokens is not None and seqlen > max_tokens:
        notes.append(f"windows of {max_tokens} tokens instead of {seqlen}: the model's context ends there")
        seqlen = max_tokens
    sources = settings.sources or DEFAULT_SOURCES
    wanted = settings.samples * seqlen
    share = -(-wanted // len(sources))
    streams = []
    for source in sources:
        documents = read_documents(source, explicit=bool(settings.sources))
        random.Random(seed).shuffle(documents)
        streams.append(torch.tensor(list(itertools.islice(_tokens(documents, tokenizer), share)), dtype=torch.int64))
    ids = torch.cat(streams)
    windows = cut(ids, seqlen)[: settings.samples]
    if len(windows) == 0:
        raise CalibrationError(
            f"{', '.join(sources)} holds {len(ids)} tokens, fewer than one window of {seqlen}",
            hint="give more text with --calibration, or shorter windows with --seqlen",
        )
    if len(windows) < settings.samples:
        notes.append(f"{len(windows)} windows instead of {settings.samples}: the text ends there")
    if len(sources) > 1:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    return CalibrationSet(windows, tuple(sources), sha256_of(windows), tuple(notes))


def sha256_of(windows: Tensor) -> str:
    """Of the token ids as little-endian int64, row by row."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def cut(ids: Tensor, seqlen: int) -> Tensor:
    """(S, seqlen) non-overlapping windows of a vector of token ids; the incomplete last one is left out."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def read_documents(source: str, *, explicit: bool = True) -> list[str]:
    """The texts of one source; raises CalibrationError where there is none."""
    path = Path(source)
    if path.suffix in LOCAL_SUFFIXES and (path.exists() or source.count(":") == 0):
        documents = _read_file(path)
    elif path.is_file():
        raise CalibrationError(
            f"{source} is no kind of file that is read", hint=f"expected {', '.join(LOCAL_SUFFIXES)}"
        )
    else:
        documents = read_hub_rows(source, HUB_DOCUMENTS, explicit=explicit)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise CalibrationError(f"{source} holds no text", hint="expected text, or rows with a column named text")
    return documents


def _tokens(documents: Sequence[str], tokenizer: Any) -> Iterator[int]:
    for text in documents:
        yield from tokenizer(text, verbose=False)["input_ids"]


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise CalibrationError(f"{path} is not a file", hint=f"expected one that ends in {', '.join(LOCAL_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _column(_parquet_rows(path), str(path), None)
    text = read_text(path)
    if path.suffix == ".txt":
        return paragraphs(text)
    rows = _json_lines(text, path) if path.suffix == ".jsonl" else _json(text, str(path))
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a JSON {type(rows).__name__}, expected a list of texts or of objects")
    return _column(rows, str(path), None)


def _json_lines(text: str, path: Path) -> list[Any]:
    """The value of each line that is not blank; only "\n" ends a line, as JSON strings may hold U+2028 and its like."""
    lines = enumerate(text.split("\n"), start=1)
    return [_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not valid JSON: {error}") from None


def read_text(path: Path) -> str:
    """A file as text; raises CalibrationError where it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example with iconv -t utf-8",
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None


def paragraphs(text: str) -> list[str]:
    """A long text as documents: cut at blank lines, each at least `PARAGRAPHS_AT_LEAST` characters long."""
    documents, gathered, length = [], [], 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        length += len(paragraph)
        if length >= PARAGRAPHS_AT_LEAST:
            documents.append("\n\n".join(gathered))
            gathered, length = [], 0
    if gathered:
        documents.append("\n\n".join(gathered))
    return documents


def _parquet_rows(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path} needs pyarrow to be read", hint="pip install pyarrow") from None
    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from None
    return rows


def _column(rows: Sequence[Any], where: str, column: str | None) -> list[str]:
    """The text of each row: the row itself, or its text column."""
    texts = []
    for number, row in enumerate(rows):
        text = row
        if isinstance(row, dict):
            key = column or next((name for name in TEXT_COLUMNS if name in row), None)
            text = row.get(key) if key else None
        if not isinstance(text, str):
            keys = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            expected = column or " or ".join(TEXT_COLUMNS)
            raise CalibrationError(f"row {number} of {where} holds {keys}, expected a text or the column {expected}")
        texts.append(text)
    return texts


def read_hub_rows(source: str, limit: int, *, explicit: bool = True) -> list[str]:
    """The first rows of a data set, blank ones too, as `name[:config][:split][:column]`.

    A local folder of data files works as a name too.  `explicit` is False for a source that the user did not name.
    """
    hint = f"give a file that ends in {', '.join(LOCAL_SUFFIXES)}"
    if not explicit:
        hint += ", such as --calibration text.txt"
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
