"""Sources with weights into one calibration set.

Each source gets its share of the sequences (by largest remainders, so that they add up), which are cut from its text.
If a source is too short, the other sources replace the missing sequences by their weights, and a note reports it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.calibration.documents import Contents
from llmq.calibration.manifest import CalibrationSet, SourceRecord, scripts_of, sha256_of
from llmq.calibration.sequences import TextWindows
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError
from llmq.source_names import SELF, Source, parse_sources


class Author(Protocol):
    """Writes the text of the source `self`."""

    notes: list[str]  # for the user, about how the text was written

    def write(self, windows: int, seqlen: int, seed: int) -> Tensor:
        """(windows, seqlen) int64."""
        ...


def load(
    settings: Calibration,
    tokenizer: Any,
    *,
    seed: int,
    max_tokens: int | None,
    author: Author | None = None,
    given: Mapping[str, Contents] | None = None,
) -> CalibrationSet:
    """Make the calibration set of a run; `max_tokens`, the context of the model, limits the length of a sequence.

    The source `self` needs an `author`; `given` are the contents of sources that are not read from a file or the Hub.
    Raises CalibrationError.
    """
    notes: list[str] = []
    seqlen = settings.seqlen
    if max_tokens is not None and seqlen > max_tokens:
        notes.append(f"sequences have {max_tokens} tokens instead of {seqlen}: the context of the model is limited")
        seqlen = max_tokens
    sources = parse_sources(settings.sources)
    own = sum(source.is_self for source in sources)
    if own > (author is not None):
        message = f"self is named {own} times" if author is not None else "self needs a model that generates text"
        raise CalibrationError(message, hint="name self once, with a weight such as self:0.2, or give a text")
    seen: set[bytes] = set()
    texts = {
        index: TextWindows(source, tokenizer, seqlen, seed, settings.packing, seen, (given or {}).get(source.name))
        for index, source in enumerate(sources)
        if not source.is_self
    }
    counts = fill(sources, texts, settings.samples)
    total = sum(counts)
    if total == 0:
        raise _too_short(sources, texts, seqlen)
    wanted = apportion(settings.samples, [source.weight for source in sources])
    parts: list[Tensor] = []
    records: list[SourceRecord] = []
    weights = sum(source.weight for source in sources)
    for index, source in enumerate(sources):
        share = source.weight / weights
        if index in texts:
            parts.append(texts[index].windows(counts[index]))
            records.append(texts[index].record(share, wanted[index], counts[index]))
            notes += records[-1].notes(texts[index].refusal)
        elif author is not None:
            parts.append(author.write(counts[index], seqlen, seed))
            records.append(_own_record(parts[-1], share, wanted[index], tokenizer))
            notes += [*author.notes, *records[-1].notes()]
    notes += _shortfall(records, settings.samples)
    windows = torch.cat(parts)
    if len(sources) > 1:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    names = tuple(source.name for source in sources)
    held_back = _held_back(sources, texts, counts, settings.held_back)
    return CalibrationSet(windows, names, sha256_of(windows), tuple(notes), tuple(records), settings.packing, held_back)


def _held_back(
    sources: Sequence[Source], texts: Mapping[int, TextWindows], counts: Sequence[int], wanted: int
) -> Tensor:
    """(V, T) int64, at most `wanted` sequences of the texts, by their weights, after the first `counts` of each.

    The source `self` gives none, because writing takes long.
    """
    shares = apportion(wanted, [sources[index].weight for index in texts]) if texts else []
    parts = [
        text.windows(text.make(counts[index] + share))[counts[index] :]
        for (index, text), share in zip(texts.items(), shares, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 0, dtype=torch.int64)


def fill(sources: Sequence[Source], texts: dict[int, TextWindows], samples: int) -> list[int]:
    """The number of sequences of each source. Sources in `texts` are read as far as necessary; `self` has no end."""
    counts = [0] * len(sources)
    short: set[int] = set()
    while True:
        rest = [index for index in range(len(sources)) if index not in short]
        left = samples - sum(counts[index] for index in short)
        for index, share in zip(rest, apportion(left, [sources[index].weight for index in rest]), strict=True):
            counts[index] = texts[index].make(share) if index in texts else share
            if counts[index] < share:
                short.add(index)
        if short.isdisjoint(rest) or short.issuperset(range(len(sources))):
            return counts


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Integers, proportional to `weights`, that add up to `total`; of equal remainders the first is rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _own_record(windows: Tensor, share: float, wanted: int, tokenizer: Any) -> SourceRecord:
    """The manifest entry of text that the model generated, which has no documents."""
    texts = [tokenizer.decode(window, skip_special_tokens=True) for window in windows.tolist()]
    return SourceRecord(
        source=SELF,
        share=share,
        wanted=wanted,
        windows=len(windows),
        tokens=windows.numel(),
        sha256=sha256_of(windows),
        characters_per_token=round(sum(map(len, texts)) / max(1, windows.numel()), 3),
        scripts=scripts_of(texts),
    )


def _shortfall(records: Sequence[SourceRecord], samples: int) -> list[str]:
    made = sum(record.windows for record in records)
    if made < samples:
        return [f"{made} sequences instead of {samples}: the text is too short"]
    return [
        f"{record.source}: {record.windows} sequences instead of {record.wanted}, its text is too short; "
        "other sources replace them"
        for record in records
        if record.windows < record.wanted
    ]


def _too_short(sources: Sequence[Source], texts: dict[int, TextWindows], seqlen: int) -> CalibrationError:
    names = ", ".join(source.name for source in sources)
    tokens = sum(text.tokens for text in texts.values())
    reasons = {text.refusal for text in texts.values() if text.refusal}
    because = f" (the chat template refuses chats: {'; '.join(sorted(reasons))})" if reasons else ""
    return CalibrationError(
        f"{names} holds {tokens} tokens, fewer than one sequence of {seqlen}{because}",
        hint="give more text with --calibration, shorter sequences with --seqlen, or let the model generate text: self",
    )
