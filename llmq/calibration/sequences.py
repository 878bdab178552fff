"""Documents into sequences: tokenized as in serving, drawn or joined end to end (`drawing.py`), never padded.

A document gets one beginning-of-text token if the tokenizer adds one, and never two. Only as many documents are
tokenized as the sequences need. The seed determines their order, so that a large file is sampled and not read from the
top. Of a long document only a part is tokenized, unless the sequences need more.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.calibration import files
from llmq.calibration.chats import Chat, has_template
from llmq.calibration.documents import Content, Contents, Document, Tokens, digest, is_blank
from llmq.calibration.drawing import drawn, packed
from llmq.calibration.manifest import ROWS_NAMED, SourceRecord, scripts_of, sha256_of
from llmq.calibration.sources import read_source
from llmq.errors import CheckpointError
from llmq.source_names import Source

PART = 8  # characters per token of a sequence: the shortest part into which a long document is cut


def cut(ids: Tensor, seqlen: int) -> Tensor:
    """Cut a vector of token ids into non-overlapping sequences (S, seqlen); an incomplete last one is dropped."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def require_embeddings(tokens: Tensor, vocabulary: int) -> None:
    """Raise CheckpointError for token ids without an embedding; the model has `vocabulary` embeddings."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the text has the token id {largest}, but the model has embeddings for {vocabulary} tokens only",
            hint="check that the tokenizer, or the given token ids, belong to the model",
        )


@dataclass
class _Counts:
    empty: int = 0
    duplicates: int = 0
    refused: int = 0
    doubled_bos: int = 0
    chats: int = 0
    untemplated: int = 0
    partial: int = 0


@dataclass
class TextWindows:
    """The sequences of one text source, made on request.

    packing  whether documents are joined end to end; otherwise sequences are drawn from many documents
    seen     digests of earlier documents, of this source and of the other sources of the run
    contents  the documents of the source, if they are not read from a file or the Hub
    """

    source: Source
    tokenizer: Any
    seqlen: int
    seed: int
    packing: bool
    seen: set[bytes] = field(default_factory=set)
    contents: Contents | None = None

    def __post_init__(self) -> None:
        contents = self.contents or read_source(self.source.name, explicit=self.source.explicit)
        self.refusal = ""  # the error of the chat template for the first chat that it refused
        self._unusable = len(contents.unusable)
        self._documents = contents.documents
        self._left_out = dict(contents.unusable)  # row -> reason
        self._counts = _Counts()
        self._texts: list[str] = []  # the texts that were read
        self._read: Counter[int] = Counter()  # number of a document -> number of its tokens that were read
        self._tokens = self._tokenized(self._shuffled(contents.documents))
        self._rest = self._sequences()
        self._made: list[Tensor] = []  # (2, seqlen) each

    @property
    def tokens(self) -> int:
        """The number of token ids so far."""
        return self._read.total()

    def make(self, windows: int) -> int:
        """Read until there are `windows` sequences, or no more text; returns the number of sequences."""
        self._made += itertools.islice(self._rest, max(0, windows - len(self._made)))
        return min(windows, len(self._made))

    def windows(self, count: int) -> Tensor:
        """The first `count` sequences, (count, seqlen) int64."""
        return self._first(count)[0]

    def all_tokens(self) -> Tensor:
        """(T,) int64, the tokens of all documents, if no sequences were made."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(tokens[0] for tokens in self._tokens)])

    def record(self, share: float, wanted: int, count: int) -> SourceRecord:
        """The manifest entry of the source, of which `wanted` sequences are its share and `count` are used."""
        windows, owners = self._first(count)
        used = Counter(owners.flatten().tolist())
        counts = self._counts
        return SourceRecord(
            source=self.source.name,
            share=share,
            wanted=wanted,
            windows=count,
            tokens=windows.numel(),
            sha256=sha256_of(windows),
            documents=len(self._documents) + self._unusable,
            unusable=self._unusable,
            empty=counts.empty,
            duplicates=counts.duplicates,
            refused=counts.refused,
            left_out=tuple(itertools.islice(self._left_out.items(), ROWS_NAMED)),
            read=len(self._read),
            truncated=sum(used[number] < tokens for number, tokens in self._read.items()),
            dropped_tokens=self.tokens - windows.numel(),
            doubled_bos=counts.doubled_bos,
            chats=counts.chats,
            untemplated=counts.untemplated,
            partial=counts.partial,
            characters_per_token=round(sum(map(len, self._texts)) / max(1, self.tokens), 3),
            scripts=scripts_of(self._texts),
        )

    def _first(self, count: int) -> Tensor:
        """The first `count` sequences, (2, count, seqlen) int64: the ids, and the number of the document of each."""
        none = torch.empty(2, 0, self.seqlen, dtype=torch.int64)
        return torch.stack(self._made[:count], dim=1) if self._made[:count] else none

    def _sequences(self) -> Iterator[Tensor]:
        if self.packing:
            return packed(self._tokens, self.seqlen)
        return drawn(self._tokens, self.seqlen, getattr(self.tokenizer, "bos_token_id", None), self.seed)

    def _shuffled(self, documents: Sequence[Document]) -> list[tuple[int, Content]]:
        """The documents that are neither empty nor duplicates, and their numbers, in random order.

        If sequences are drawn, a long text is cut into parts: the first parts of all documents, then the second ones.
        """
        kept = []
        for number, document in enumerate(documents):
            if is_blank(document):
                self._counts.empty += 1
                continue
            own = digest(document.content)
            self._counts.duplicates += own in self.seen
            if own not in self.seen:
                kept.append((number, document.content))
            self.seen.add(own)
        chance = random.Random(self.seed)
        chance.shuffle(kept)
        if self.packing:
            return kept
        turns: list[tuple[int, int, Content]] = []
        for number, content in kept:
            parts = self._parts(content)
            chance.shuffle(parts)
            turns += [(turn, number, part) for turn, part in enumerate(parts)]
        turns.sort(key=lambda part: part[0])
        return [(number, part) for _, number, part in turns]

    def _parts(self, content: Content) -> list[Content]:
        size = PART * self.seqlen
        if not isinstance(content, str) or len(content) <= files.LONGEST * size:
            return [content]
        return [*files.pieces(content, size)]

    def _tokenized(self, documents: Sequence[tuple[int, Content]]) -> Iterator[Tensor]:
        """Yield (2, n) int64 for each document: its token ids, and its number."""
        ids: list[int]
        for number, content in documents:
            if isinstance(content, Tokens):
                text, ids = self.tokenizer.decode(content.ids), list(content.ids)
            elif isinstance(content, Chat) and has_template(self.tokenizer):
                text = self._rendered(number, content)
                if text is None:
                    continue
                self._counts.chats += 1
                ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                text = content.contents if isinstance(content, Chat) else content
                self._counts.untemplated += isinstance(content, Chat)
                ids = self._without_doubled_bos(self.tokenizer(text, verbose=False)["input_ids"])
            self._counts.partial += isinstance(content, Chat) and content.left_out > 0
            self._texts.append(text)
            self._read[number] += len(ids)
            yield torch.tensor([ids, [number] * len(ids)], dtype=torch.int64)

    def _rendered(self, number: int, chat: Chat) -> str | None:
        try:
            return chat.rendered(self.tokenizer)
        except Exception as error:  # a template is a program, and may raise any exception
            self._counts.refused += 1
            self._left_out[self._documents[number].row] = f"is refused by the chat template: {error}"
            self.refusal = self.refusal or str(error)
            return None

    def _without_doubled_bos(self, ids: list[int]) -> list[int]:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or ids[:2] != [begin, begin]:
            return ids
        self._counts.doubled_bos += 1
        return ids[1:]
