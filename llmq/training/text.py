"""The text of a training: sequences to train on, and others on which nothing is trained.

Sources and readers are those of calibration, but all the text is used, not a sample of it: more text, less overfitting.
Documents are joined end to end. Only as many sequences are made as the training draws.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.calibration import sha256_of
from llmq.calibration.sequences import TextWindows, require_embeddings
from llmq.calibration.sources import without_folder
from llmq.errors import CalibrationError
from llmq.source_names import parse_sources

MOST_HELD_OUT, HELD_OUT_PART = 64, 16  # by default one sequence per 16, at most 64


@dataclass(frozen=True)
class TrainingText:
    """windows (S, T) int64 to train on; held_out (H, T) int64 to validate on; `sources` are names without folders."""

    windows: Tensor
    held_out: Tensor
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return sha256_of(torch.cat([self.windows, self.held_out]))

    def about(self) -> dict[str, Any]:
        """Plain values for llmq.json."""
        S, T = self.windows.shape
        counts = {"sequences": S, "held_out": len(self.held_out), "sequence_length": T}
        return {"sources": list(self.sources), **counts, "sha256": self.sha256}


def read(
    data: Sequence[str], tokenizer: Any, length: int, *, vocabulary: int, drawn: int, held_out: int | None, seed: int
) -> TrainingText:
    """Read all sources as sequences of `length` tokens: `held_out` for validation, at most `drawn` others to train on.

    Raises CalibrationError for text that cannot be read or is too short, CheckpointError for ids without an embedding.
    """
    by_source: list[Tensor] = []
    notes, seen, sources = list[str](), set[bytes](), parse_sources(data)
    most = drawn + (MOST_HELD_OUT if held_out is None else held_out)
    for source in sources:
        if source.is_self or source.weight != 1:
            raise CalibrationError(
                f"{source.name} with the weight {source.weight:g} is not a text to train on",
                hint="give files or datasets without weights: all their text is used",
            )
        text = TextWindows(source, tokenizer, length, seed, packing=True, seen=seen)
        made = text.make(most)
        by_source.append(text.windows(made))
        notes += text.record(1.0, made, made).notes()
    total = sum(map(len, by_source))
    kept = min(MOST_HELD_OUT, max(1, total // HELD_OUT_PART)) if held_out is None else held_out
    if total - kept < 1:
        raise CalibrationError(
            f"the text has {total} sequences of {length} tokens, expected at least {kept + 1}: {kept} to validate on, "
            "and others to train on",
            hint="give more text, or lower --sequence-length or --held-out",
        )
    # The last documents of each source, in the order of the seed: no other part of them is trained on.
    ends = [round(kept * sum(map(len, by_source[:number])) / total) for number in range(len(by_source) + 1)]
    counts = [stop - start for start, stop in itertools.pairwise(ends)]
    pairs = [part.split([len(part) - count, count]) for part, count in zip(by_source, counts, strict=True)]
    windows, validation = (torch.cat(own) for own in zip(*pairs, strict=True))
    require_embeddings(torch.cat([windows, validation]), vocabulary)
    names = tuple(without_folder(source.name) for source in sources)
    return TrainingText(windows, validation, names, tuple(notes))
