"""The manifest of a calibration text: what was read, used and left out of each source.

The manifest is printed before the work starts and stored with the checkpoint, so that everybody can see which text the
model was calibrated on. Notes point out problems of the text: duplicates, doubled beginning-of-text tokens, chats
without a template.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.documents import left_out_like

SCRIPTS_SHOWN = 4
ROWS_NAMED = 20  # of those that were left out
SCRIPTS = {"cjk": "Han", "ideographic": "Han", "fullwidth": "Latin", "halfwidth": "Katakana"}  # by first word of name


@dataclass(frozen=True)
class SourceRecord:
    """One source of a calibration set.

    documents    number of rows; each is unusable (neither a text nor a chat), empty, a duplicate (of a document in this
                 source or an earlier one), refused (the chat template raised an error), read, or not needed
    left_out     the first unusable and refused rows, each with the reason
    truncated    documents of which some of the tokens that were read are in no sequence
    share        requested fraction of all sequences; `wanted` is that number, `windows` the number that was made
    dropped_tokens  tokens that were read and are in no sequence
    doubled_bos  documents that start with the beginning-of-text token of the tokenizer; one of the two was removed
    untemplated  chats that were read as plain text because the tokenizer has no template
    partial      chats without their parts that are not text, such as images
    scripts      fraction of the letters that were read, the most frequent script first
    sha256       hash of its sequences
    """

    source: str
    share: float
    wanted: int
    windows: int
    tokens: int
    sha256: str
    documents: int = 0
    unusable: int = 0
    empty: int = 0
    duplicates: int = 0
    refused: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    read: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    doubled_bos: int = 0
    chats: int = 0
    untemplated: int = 0
    partial: int = 0
    characters_per_token: float = 0.0
    scripts: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "left_out": dict(self.left_out), "scripts": dict(self.scripts)}

    def notes(self, refusal: str = "") -> list[str]:
        """Problems of this source that a user should know; `refusal` is the error message of the chat template."""
        first = self.left_out[0] if self.left_out else ("", "")  # unusable rows come before refused ones
        problems = (
            (self.unusable, left_out_like(*first)),
            (self.duplicates, "documents are duplicates; each text was read once"),
            (self.empty, "documents are empty and were left out"),
            (
                self.doubled_bos,
                "documents start with the token that the tokenizer adds; the second one was removed",
            ),
            (self.untemplated, "chats were read as plain text: the tokenizer has no chat template"),
            (self.partial, "chats were read without their parts that are not text, such as images"),
            (self.refused, f"chats were left out because the chat template refuses them: {refusal}"),
        )
        notes = [f"{self.source}: {count} of {self.documents} {problem}" for count, problem in problems if count]
        if self.share > 0 and self.wanted == 0:
            notes.append(f"{self.source}: its share is less than one sequence, so none was read")
        return notes


@dataclass(frozen=True)
class CalibrationSet:
    """The sequences `windows` (S, T) int64, their sources, the SHA-256 of the ids, notes, and a record per source.

    packing    whether documents were joined end to end, and sequences were not drawn from many documents
    held_back  (V, T) int64, further sequences of the same sources, to measure the finished model on
    """

    windows: Tensor
    sources: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    records: tuple[SourceRecord, ...] = ()
    packing: bool = False
    held_back: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def to_dict(self) -> dict[str, Any]:
        samples, seqlen = self.windows.shape
        return {
            "sources": list(self.sources),
            "samples": samples,
            "seqlen": seqlen,
            "tokens": samples * seqlen,
            "sha256": self.sha256,
            "packing": self.packing,
            "notes": list(self.notes),
            "manifest": [record.to_dict() for record in self.records],
        }


def sha256_of(windows: Tensor) -> str:
    """The SHA-256 of the token ids as little-endian int64, row by row."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def scripts_of(texts: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """The writing systems of the letters and their fractions of all letters, the most frequent first.

    The first word of a letter's Unicode name is its script: LATIN SMALL LETTER A, CYRILLIC …, CJK UNIFIED IDEOGRAPH …
    """
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[_script(character)] += count
    letters = scripts.total()
    return tuple((script, round(count / letters, 4)) for script, count in scripts.most_common(SCRIPTS_SHOWN))


@lru_cache(maxsize=100_000)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split()[0].partition("-")[0].lower()
    return SCRIPTS.get(first, first.capitalize())
