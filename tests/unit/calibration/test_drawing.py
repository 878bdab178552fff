"""Sequences that are drawn: from as many documents as there are sequences, at random places, without a loss."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq import calibration
from llmq.calibration import CalibrationSet
from llmq.calibration.drawing import drawn, packed
from llmq.calibration_settings import Calibration

BOS = 1


def numbered(lengths: list[int]) -> list[Tensor]:
    """Documents (2, n) of these lengths; the ids are different in all of them."""
    starts = torch.tensor([1000, *lengths]).cumsum(0).tolist()
    return [
        torch.stack([torch.arange(start, start + length), torch.full((length,), number)])
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 70), max_size=12), st.integers(1, 20), st.integers(0, 3))
def test_only_an_incomplete_last_sequence_is_lost(lengths: list[int], seqlen: int, seed: int) -> None:
    documents = numbered(lengths)
    for sequences in (list(packed(documents, seqlen)), list(drawn(documents, seqlen, None, seed))):
        assert len(sequences) == sum(lengths) // seqlen
        assert all(sequence.shape == (2, seqlen) for sequence in sequences)
        tokens = Counter(int(token) for sequence in sequences for token in sequence[0])
        assert set(tokens.values()) <= {1}, "no token is used twice"


@settings(max_examples=30)
@given(st.lists(st.integers(20, 70), min_size=1, max_size=12), st.integers(0, 3))
def test_first_sequences_are_consecutive_tokens_of_different_documents(lengths: list[int], seed: int) -> None:
    sequences = list(drawn(numbered(lengths), 20, None, seed))[: len(lengths)]
    assert [sequence[1].unique().tolist() for sequence in sequences] == [[number] for number in range(len(lengths))]
    assert all((sequence[0].diff() == 1).all() for sequence in sequences)


def test_place_of_a_sequence_is_random() -> None:
    """All 81 places of 20 tokens in 100 occur in 2000 draws, and none of them ten times as often as on average."""
    [document] = numbered([100])
    starts = Counter(int(next(drawn([document], 20, None, seed))[0, 0]) - 1000 for seed in range(2000))
    assert set(starts) <= set(range(81)) and len(starts) > 4
    assert max(starts.values()) < 1000


def test_short_documents_are_joined() -> None:
    """The third sequence has the rest of the short documents and the unused ends of the long one."""
    documents = numbered([7, 30, 7, 7, 7, 8])
    first, second, third = list(drawn(documents, 20, None, seed=0))
    joined = torch.cat([documents[number] for number in (0, 2, 3, 4, 5)], dim=1)
    assert first[1].unique().tolist() == [1]
    assert torch.equal(second, joined[:, :20]) and torch.equal(third[:, :16], joined[:, 20:])
    assert third[1, 16:].tolist() == [1] * 4


def test_drawn_sequence_begins_as_a_text_in_serving() -> None:
    documents = numbered([50, 50])
    documents[0][0, 0] = BOS
    with_begin, without = list(drawn(documents, 20, BOS, seed=1))[:2]
    assert int(with_begin[0, 0]) == BOS and int(without[0, 0]) != BOS
    assert int(documents[0][0, 1]) != BOS, "the document is not changed"


# ---- of files


def load(tokenizer: Any, file: Path, **settings: Any) -> CalibrationSet:
    return calibration.load(
        Calibration(sources=(str(file),), **settings), tokenizer, seed=settings.pop("seed", 0), max_tokens=None
    )


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """40 texts of 400 characters, one letter each."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(chr(ord("0") + number) * 400) for number in range(40)))
    return file


def test_default_is_one_sequence_per_document(documents: Path, tokenizer: Any) -> None:
    loaded = load(tokenizer, documents, samples=30, seqlen=16)
    assert not loaded.packing and loaded.windows[:, 0].tolist() == [BOS] * 30
    assert len(set(loaded.windows[:, -1].tolist())) == 30
    record = loaded.records[0]
    assert (record.read, record.truncated, record.dropped_tokens) == (30, 30, 30 * 401 - 30 * 16)
    packing = load(tokenizer, documents, samples=30, seqlen=16, packing=True)
    assert packing.packing and packing.records[0].read == 2


def test_text_that_is_just_long_enough_is_used_completely(documents: Path, tokenizer: Any) -> None:
    loaded = load(tokenizer, documents, samples=2000, seqlen=16)
    assert len(loaded.windows) == 40 * 401 // 16
    assert loaded.records[0].dropped_tokens < 16


def test_only_a_part_of_a_long_document_is_tokenized(tokenizer: Any, tmp_path: Path) -> None:
    lengths: list[int] = []

    def recording(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return tokenizer(text, **options)

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(f"{number} is a number. " * 1000) for number in range(3)))
    assert len(load(recording, file, samples=3, seqlen=16).windows) == 3
    assert len(lengths) == 3 and max(lengths) <= 32 * 16
    assert len(load(recording, file, samples=1000, seqlen=16).windows) == 1000


def test_one_long_text_gives_sequences_from_everywhere(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{number:05}" for number in range(20_000)))
    numbers = [
        int(tokenizer.decode(window).split()[2]) for window in load(tokenizer, file, samples=8, seqlen=32).windows
    ]
    assert max(numbers) - min(numbers) > 8_000
