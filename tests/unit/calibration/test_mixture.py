"""Several sources: how they are written, and how many windows each gives."""

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
from llmq.calibration.sources import DEFAULT_SOURCES, Source, parse_sources
from llmq.config import Calibration
from llmq.errors import CalibrationError

OWN = 5  # the id of which the author below writes everything


class OneLetter:
    """An author that is quick."""

    def __init__(self) -> None:
        self.notes: list[str] = ["self: a note"]

    def write(self, windows: int, seqlen: int, seed: int) -> Tensor:
        return torch.full((windows, seqlen), OWN)


def letters(folder: Path, letter: str, documents: int, *, column: str = "text") -> str:
    """A file of different documents of 16 tokens that are made of one letter and digits."""
    rows = [{column: f"{number:03}" + letter * 12} for number in range(documents)]
    (folder / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / f"{letter}.jsonl")


def load(tokenizer: Any, *sources: str, samples: int, author: Any = None, seed: int = 0) -> CalibrationSet:
    settings = Calibration(sources=sources, samples=samples, seqlen=16)
    return calibration.load(settings, tokenizer, seed=seed, max_tokens=None, author=author)


def given_by(found: CalibrationSet) -> list[int]:
    return [record.windows for record in found.records]


# ---- how they are written


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
def test_a_number_at_the_end_is_a_weight(text: str, name: str, weight: float) -> None:
    assert parse_sources([text]) == [Source(name, weight)]


def test_several_with_weights_may_stand_in_one_text() -> None:
    assert parse_sources(["a.txt:0.5 b.jsonl:0.3 self:0.2"]) == parse_sources(["a.txt:0.5", "b.jsonl:0.3", "self:0.2"])
    assert parse_sources(["my text.txt", "my text.txt:2"]) == [Source("my text.txt"), Source("my text.txt", 2.0)]


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt:2").touch()
    assert parse_sources([str(tmp_path / "text.txt:2")]) == [Source(str(tmp_path / "text.txt:2"))]


def test_no_source_is_the_default_ones() -> None:
    assert [source.name for source in parse_sources([])] == list(DEFAULT_SOURCES)
    assert not any(source.explicit for source in parse_sources([]))


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:0.0", "self:0"])
def test_a_weight_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="expected more than 0"):
        parse_sources([text])


def test_a_column_of_a_file_is_named_behind_it(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "not this", "body": "but this"}')
    assert calibration.read_documents(f"{tmp_path}/rows.jsonl:body") == ["but this"]
    with pytest.raises(CalibrationError, match="the columns text, body, expected .* the column tail"):
        calibration.read_documents(f"{tmp_path}/rows.jsonl:tail")
    with pytest.raises(CalibrationError, match=r"nowhere\.jsonl is not a file"):
        calibration.read_documents(f"{tmp_path}/nowhere.jsonl:body")


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(CalibrationError, match="has no column body"):
        calibration.read_documents(f"{tmp_path}/text.txt:body")


# ---- how many windows each gives


@given(st.integers(1, 300), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_parts_add_up_and_are_less_than_one_from_the_share(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


def test_windows_come_by_weight_and_each_from_one_source(tokenizer: Any, tmp_path: Path) -> None:
    sources = [f"{letters(tmp_path, 'a', 9)}:0.5", f"{letters(tmp_path, 'b', 9)}:0.3", "self:0.2"]
    found = load(tokenizer, *sources, samples=10, author=OneLetter())
    assert given_by(found) == [5, 3, 2]
    ends = tokenizer.decode(found.windows[:, -1])
    own = tokenizer.decode([OWN])
    assert sorted(ends) == sorted("aaaaabbb" + 2 * own) and ends != "".join(sorted(ends))
    assert found.notes == ("self: a note",)
    assert [record.share for record in found.records] == pytest.approx([0.5, 0.3, 0.2])
    assert found.sources == tuple(source.rpartition(":")[0] for source in sources)


def test_a_source_that_is_too_short_is_made_up_for_and_said(tokenizer: Any, tmp_path: Path) -> None:
    short, long = letters(tmp_path, "a", 2), letters(tmp_path, "b", 30)
    found = load(tokenizer, short, f"{long}:2", "self:1", samples=20, author=OneLetter())
    assert given_by(found) == [2, 12, 6]  # 18 that are left, two to one
    note = f"{short}: 2 windows instead of 5, its text ends there; the other sources make up for it"
    assert found.notes == ("self: a note", note)
    assert found.windows.shape == (20, 16)


def test_one_that_falls_short_of_what_it_is_to_make_up_for_is_made_up_for_too(tokenizer: Any, tmp_path: Path) -> None:
    sources = [letters(tmp_path, "a", 1), letters(tmp_path, "b", 5), letters(tmp_path, "c", 30)]
    assert given_by(load(tokenizer, *sources, samples=12)) == [1, 5, 6]
    found = load(tokenizer, *sources, samples=100)
    assert given_by(found) == [1, 5, 30] and found.notes == ("36 windows instead of 100: the text ends there",)


def test_a_share_of_less_than_a_window_is_said(tokenizer: Any, tmp_path: Path) -> None:
    small = letters(tmp_path, "a", 3)
    found = load(tokenizer, f"{small}:0.01", letters(tmp_path, "b", 9), samples=4)
    assert given_by(found) == [0, 4]
    assert found.notes == (f"{small}: its share is less than one window, and none was read",)


def test_a_mixture_is_the_seeds(tokenizer: Any, tmp_path: Path) -> None:
    sources = [letters(tmp_path, "a", 30), letters(tmp_path, "b", 30)]
    first, again, other = (load(tokenizer, *sources, samples=6, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(("author", "words"), [(None, "needs a model"), (OneLetter(), "named 2 times")])
def test_self_is_one_author(author: Any, words: str, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=words):
        load(tokenizer, "self:0.5", "self:0.5", samples=2, author=author)
