"""The text of a training: all of it, and whole documents held out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.errors import CalibrationError, CheckpointError
from llmq.training.text import TrainingText, read

LENGTH = 8


class OnePerLetter:
    """A tokenizer with one token per character and no special tokens."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def documents(file: Path, first: int, count: int, length: int = 4 * LENGTH) -> Path:
    """Documents of one letter each, from chr(first)."""
    rows = [json.dumps({"text": chr(first + number) * length}) for number in range(count)]
    file.write_text("\n".join(rows))
    return file


def read_all(*files: Path, drawn: int = 10**6, held_out: int | None = None, vocabulary: int = 10**6) -> TrainingText:
    names = [str(file) for file in files]
    return read(names, OnePerLetter(), LENGTH, vocabulary=vocabulary, drawn=drawn, held_out=held_out, seed=0)


def test_all_text_is_used_and_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    text = read_all(documents(tmp_path / "a.jsonl", 100, 20), documents(tmp_path / "b.jsonl", 200, 60), held_out=16)
    assert text.windows.shape == (4 * 80 - 16, LENGTH) and text.held_out.shape == (16, LENGTH)
    assert not set(text.windows.flatten().tolist()) & set(text.held_out.flatten().tolist())
    assert int((text.held_out[:, 0] < 200).sum()) == 4  # in proportion to the sources
    assert text.about()["sequences"] == 304 and text.sources


def test_only_what_is_drawn_is_read(tmp_path: Path) -> None:
    text = read_all(documents(tmp_path / "a.jsonl", 100, 100), drawn=10, held_out=2)
    assert len(text.windows) == 10 and len(text.held_out) == 2


def test_by_default_a_sixteenth_is_held_out(tmp_path: Path) -> None:
    assert len(read_all(documents(tmp_path / "a.jsonl", 100, 8)).held_out) == 2
    assert len(read_all(documents(tmp_path / "a.jsonl", 100, 1)).held_out) == 1


def test_unusable_text_is_refused(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 100, 1)
    with pytest.raises(CalibrationError, match="has 4 sequences of 8 tokens, expected at least 5"):
        read_all(file, held_out=4)
    with pytest.raises(CalibrationError, match="not a text to train on"):
        read_all(Path(f"{file}:0.5"))
    with pytest.raises(CheckpointError, match="token id 100"):
        read_all(file, vocabulary=50)


def test_hash_changes_with_the_text(tmp_path: Path) -> None:
    one, other = (read_all(documents(tmp_path / f"{first}.jsonl", first, 8)) for first in (100, 101))
    assert one.sha256 != other.sha256
    assert torch.equal(one.windows, read_all(tmp_path / "100.jsonl").windows)
