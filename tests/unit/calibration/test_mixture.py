"""Mixtures of sources: how they are parsed, and how many sequences each source gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq import calibration
from llmq.calibration import CalibrationSet
from llmq.calibration.mixture import apportion
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError
from llmq.source_names import DEFAULT_SOURCES, Source, parse_sources

OWN = 5  # the only token that the author below writes


class OneLetter:
    """An author that writes one token only."""

    def __init__(self) -> None:
        self.notes: list[str] = ["self: a note"]

    def write(self, windows: int, seqlen: int, seed: int) -> Tensor:
        return torch.full((windows, seqlen), OWN)


def letters(folder: Path, letter: str, documents: int, *, column: str = "text") -> str:
    """A file of different documents with 16 tokens: one letter and digits."""
    rows = [{column: f"{number:03}" + letter * 12} for number in range(documents)]
    (folder / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / f"{letter}.jsonl")


def load(tokenizer: Any, *sources: str, samples: int, author: Any = None, seed: int = 0) -> CalibrationSet:
    settings = Calibration(sources=sources, samples=samples, seqlen=16)
    return calibration.load(settings, tokenizer, seed=seed, max_tokens=None, author=author)


def given_by(loaded: CalibrationSet) -> list[int]:
    return [record.windows for record in loaded.records]


# ---- parsing


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.txt", "a.txt", 1.0),
        ("a.txt:0.5", "a.txt", 0.5),
        ("self", "self", 1.0),
        ("self:.25", "self", 0.25),
        ("rows.jsonl:body:2", "rows.jsonl:body", 2.0),
        ("allenai/c4:en:train:text:0.3", "allenai/c4:en:train:text", 0.3),
        ("allenai/c4:en:train:text", "allenai/c4:en:train:text", 1.0),
        ("news:2024:", "news:2024:", 1.0),
    ],
)
def test_number_at_the_end_is_a_weight(text: str, name: str, weight: float) -> None:
    assert parse_sources([text]) == [Source(name, weight)]


def test_one_text_may_hold_several_weighted_sources() -> None:
    assert parse_sources(["a.txt:0.5 b.jsonl:0.3 self:0.2"]) == parse_sources(["a.txt:0.5", "b.jsonl:0.3", "self:0.2"])
    assert parse_sources(["my text.txt", "my text.txt:2"]) == [Source("my text.txt"), Source("my text.txt", 2.0)]


def test_existing_file_with_weight_like_name_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt:2").touch()
    assert parse_sources([str(tmp_path / "text.txt:2")]) == [Source(str(tmp_path / "text.txt:2"))]


def test_no_source_gives_the_defaults() -> None:
    assert [source.name for source in parse_sources([])] == list(DEFAULT_SOURCES)
    assert not any(source.explicit for source in parse_sources([]))


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:0.0", "self:0"])
def test_weight_zero_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="expected more than 0"):
        parse_sources([text])


def test_file_name_may_select_a_column(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "not this", "body": "but this"}')
    assert calibration.read_documents(f"{tmp_path}/rows.jsonl:body") == ["but this"]
    with pytest.raises(CalibrationError, match="the columns text, body, expected .* the column tail"):
        calibration.read_documents(f"{tmp_path}/rows.jsonl:tail")
    with pytest.raises(CalibrationError, match=r"nowhere\.jsonl does not exist"):
        calibration.read_documents(f"{tmp_path}/nowhere.jsonl:body")


def test_plain_text_refuses_a_column(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(CalibrationError, match="has no column body"):
        calibration.read_documents(f"{tmp_path}/text.txt:body")


# ---- number of sequences per source


@given(st.integers(1, 300), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_apportioned_parts_add_up_and_match_shares(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


def test_sequences_are_divided_by_weight(tokenizer: Any, tmp_path: Path) -> None:
    sources = [f"{letters(tmp_path, 'a', 9)}:0.5", f"{letters(tmp_path, 'b', 9)}:0.3", "self:0.2"]
    loaded = load(tokenizer, *sources, samples=10, author=OneLetter())
    assert given_by(loaded) == [5, 3, 2]
    ends = tokenizer.decode(loaded.windows[:, -1])
    own = tokenizer.decode([OWN])
    assert sorted(ends) == sorted("aaaaabbb" + 2 * own) and ends != "".join(sorted(ends))
    assert loaded.notes == ("self: a note",)
    assert [record.share for record in loaded.records] == pytest.approx([0.5, 0.3, 0.2])
    assert loaded.sources == tuple(source.rpartition(":")[0] for source in sources)


def test_other_sources_replace_a_short_source(tokenizer: Any, tmp_path: Path) -> None:
    short, long = letters(tmp_path, "a", 2), letters(tmp_path, "b", 30)
    loaded = load(tokenizer, short, f"{long}:2", "self:1", samples=20, author=OneLetter())
    assert given_by(loaded) == [2, 12, 6]  # the remaining 18, two to one
    note = f"{short}: 2 sequences instead of 5, its text is too short; other sources replace them"
    assert loaded.notes == ("self: a note", note)
    assert loaded.windows.shape == (20, 16)


def test_several_short_sources_are_replaced(tokenizer: Any, tmp_path: Path) -> None:
    sources = [letters(tmp_path, "a", 1), letters(tmp_path, "b", 5), letters(tmp_path, "c", 30)]
    assert given_by(load(tokenizer, *sources, samples=12)) == [1, 5, 6]
    loaded = load(tokenizer, *sources, samples=100)
    assert given_by(loaded) == [1, 5, 30] and loaded.notes == ("36 sequences instead of 100: the text is too short",)


def test_share_below_one_sequence_is_reported(tokenizer: Any, tmp_path: Path) -> None:
    small = letters(tmp_path, "a", 3)
    loaded = load(tokenizer, f"{small}:0.01", letters(tmp_path, "b", 9), samples=4)
    assert given_by(loaded) == [0, 4]
    assert loaded.notes == (f"{small}: its share is less than one sequence, so none was read",)


def test_seed_determines_the_mixture(tokenizer: Any, tmp_path: Path) -> None:
    sources = [letters(tmp_path, "a", 30), letters(tmp_path, "b", 30)]
    first, again, other = (load(tokenizer, *sources, samples=6, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(("author", "words"), [(None, "needs a model"), (OneLetter(), "named 2 times")])
def test_self_is_accepted_once(author: Any, words: str, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=words):
        load(tokenizer, "self:0.5", "self:0.5", samples=2, author=author)
