"""What was read, and what became of it: nothing is left out without a line about it here.

The manifest is printed before the work starts and stored with the checkpoint, so that whoever has the file knows what
it was fitted to, and the linter's notes say what deserves a look: text that is there twice, a beginning-of-text token
too many, chats without a template.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

SCRIPTS_SHOWN = 4
SCRIPTS = {"cjk": "Han", "ideographic": "Han", "fullwidth": "Latin", "halfwidth": "Katakana"}  # first words of names


@dataclass(frozen=True)
class SourceRecord:
    """One source of a calibration set.

    documents    how many it holds; each is one of empty, duplicates (the same text came before, in this source or an
                 earlier one), refused (a chat that the template raised an error for), read, or not needed
    truncated    read documents that were cut, or left out, by the end of the last whole window
    share        of all windows, as it was asked for; `wanted` windows came of that, `windows` are there
    dropped_tokens  what was left behind the last whole window
    doubled_bos  documents that brought the tokenizer's beginning-of-text token; one of the two was taken away
    untemplated  chats read as plain text, as the tokenizer has no template
    scripts      fraction of the letters of what was read, the most frequent first
    sha256       of its windows
    """

    source: str
    share: float
    wanted: int
    windows: int
    tokens: int
    sha256: str
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    refused: int = 0
    read: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    doubled_bos: int = 0
    chats: int = 0
    untemplated: int = 0
    characters_per_token: float = 0.0
    scripts: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scripts": dict(self.scripts)}

    def notes(self, refusal: str = "") -> list[str]:
        """The linter: what a user should know of this source; `refusal` is what the template said."""
        told = (
            (self.duplicates, "documents are there a second time; each was read once"),
            (self.empty, "documents are empty, and were left out"),
            (
                self.doubled_bos,
                "documents bring the token that the tokenizer puts in front; they have it once",
            ),
            (self.untemplated, "chats were read as plain text: the tokenizer has no chat template"),
            (self.refused, f"chats were left out, the tokenizer's template does not take them: {refusal}"),
        )
        notes = [f"{self.source}: {count} of {self.documents} {what}" for count, what in told if count]
        if self.share > 0 and self.wanted == 0:
            notes.append(f"{self.source}: its share is less than one window, and none was read")
        return notes


@dataclass(frozen=True)
class CalibrationSet:
    """windows (S, T) int64; where they came from; sha256 of the ids; what a user should be told; a record a source."""

    windows: Tensor
    sources: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    records: tuple[SourceRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        samples, seqlen = self.windows.shape
        return {
            "sources": list(self.sources),
            "samples": samples,
            "seqlen": seqlen,
            "tokens": samples * seqlen,
            "sha256": self.sha256,
            "notes": list(self.notes),
            "manifest": [record.to_dict() for record in self.records],
        }


def sha256_of(windows: Tensor) -> str:
    """Of the token ids as little-endian int64, row by row."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def scripts_of(texts: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """The writing systems of the letters, by how frequent they are; their fractions of all letters.

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
