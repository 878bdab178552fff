"""Documents into sequences: tokenized as in serving, joined end to end, cut, never padded.

A document gets one beginning-of-text token if the tokenizer adds one, and never two. Only as many documents are
tokenized as the sequences need. The seed determines their order, so that a large file is sampled and not read from the
top.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.chats import Chat, has_template
from llmq.calibration.documents import Document, is_blank
from llmq.calibration.manifest import SourceRecord, scripts_of, sha256_of
from llmq.calibration.sources import Source, read_source
from llmq.errors import CheckpointError


def cut(ids: Tensor, seqlen: int) -> Tensor:
    """Cut a vector of token ids into non-overlapping sequences (S, seqlen); an incomplete last one is dropped."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def require_embeddings(tokens: Tensor, vocabulary: int) -> None:
    """Raise CheckpointError for token ids without an embedding; the model has `vocabulary` embeddings."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer produced the token id {largest}, but the model has embeddings for {vocabulary} tokens only",
            hint="check that the tokenizer belongs to the model",
        )


@dataclass
class _Counts:
    empty: int = 0
    duplicates: int = 0
    refused: int = 0
    doubled_bos: int = 0
    chats: int = 0
    untemplated: int = 0


@dataclass
class TextWindows:
    """The sequences of one text source, made on request.

    `seen` holds the digests of earlier documents, of this source and of the other sources of the run.
    """

    source: Source
    tokenizer: Any
    seqlen: int
    seed: int
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        documents = read_source(self.source.name, explicit=self.source.explicit).documents
        self.refusal = ""  # the error of the chat template for the first chat that it refused
        self._documents = len(documents)
        self._counts = _Counts()
        self._ids: list[int] = []
        self._texts: list[str] = []  # the texts that were read
        self._ends: list[int] = []  # number of ids up to the end of each text
        self._rest = self._tokenized(self._drawn(documents))
        self._exhausted = False

    @property
    def tokens(self) -> int:
        """The number of token ids so far."""
        return len(self._ids)

    def make(self, windows: int) -> int:
        """Read until there are `windows` sequences, or no more text; returns the number of sequences."""
        while len(self._ids) < windows * self.seqlen and not self._exhausted:
            ids = next(self._rest, None)
            self._exhausted = ids is None
            if ids is not None:
                self._ids += ids
                self._ends.append(len(self._ids))
        return min(windows, len(self._ids) // self.seqlen)

    def windows(self, count: int) -> Tensor:
        """The first `count` sequences, (count, seqlen) int64."""
        return torch.tensor(self._ids[: count * self.seqlen], dtype=torch.int64).view(count, self.seqlen)

    def record(self, share: float, wanted: int, count: int) -> SourceRecord:
        """The manifest entry of the source, of which `wanted` sequences are its share and `count` are used."""
        windows = self.windows(count)
        rest = len(self._ids) - windows.numel()
        counts = self._counts
        return SourceRecord(
            source=self.source.name,
            share=share,
            wanted=wanted,
            windows=count,
            tokens=windows.numel(),
            sha256=sha256_of(windows),
            documents=self._documents,
            empty=counts.empty,
            duplicates=counts.duplicates,
            refused=counts.refused,
            read=len(self._texts),
            truncated=sum(end > windows.numel() for end in self._ends),
            dropped_tokens=rest,
            doubled_bos=counts.doubled_bos,
            chats=counts.chats,
            untemplated=counts.untemplated,
            characters_per_token=round(sum(map(len, self._texts)) / max(1, len(self._ids)), 3),
            scripts=scripts_of(self._texts),
        )

    def _drawn(self, documents: Sequence[Document]) -> list[Document]:
        """The documents that are neither empty nor duplicates, in random order."""
        kept = []
        for document in documents:
            if is_blank(document):
                self._counts.empty += 1
                continue
            digest = _digest(document)
            self._counts.duplicates += digest in self.seen
            if digest not in self.seen:
                kept.append(document)
            self.seen.add(digest)
        random.Random(self.seed).shuffle(kept)
        return kept

    def _tokenized(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        """Yield the token ids of each document."""
        for document in documents:
            if isinstance(document, Chat) and has_template(self.tokenizer):
                text = self._rendered(document)
                if text is None:
                    continue
                self._counts.chats += 1
                ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                if isinstance(document, Chat):
                    self._counts.untemplated += 1
                text = document.contents if isinstance(document, Chat) else document
                ids = self._without_doubled_bos(self.tokenizer(text, verbose=False)["input_ids"])
            self._texts.append(text)
            yield ids

    def _rendered(self, chat: Chat) -> str | None:
        try:
            return chat.rendered(self.tokenizer)
        except Exception as error:  # a template is a program, and may raise any exception
            self._counts.refused += 1
            self.refusal = self.refusal or str(error)
            return None

    def _without_doubled_bos(self, ids: list[int]) -> list[int]:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or ids[:2] != [begin, begin]:
            return ids
        self._counts.doubled_bos += 1
        return ids[1:]


def _digest(document: Document) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document.messages)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
