"""Evaluation texts: sequences, documents, names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import calibration
from llmq.calibration import sources
from llmq.errors import CalibrationError, ConfigError
from llmq.evaluation.texts import named, read_text, read_texts, wikitext_rows

BOS = 1

# ---- rows of WikiText


def test_wikitext_rows_are_joined_with_blank_lines() -> None:
    text = " \n = Title = \n \n First paragraph . \n Second one . \n \n"
    rows = ["", " = Title = \n", "", " First paragraph . \n", " Second one . \n", ""]
    assert wikitext_rows(text) == "\n\n".join(rows)


def test_only_a_line_feed_ends_a_row() -> None:
    text = " one\u2028line \n another\x0cline \n"
    assert wikitext_rows(text) == " one\u2028line \n\n\n another\x0cline \n"


def test_wikitext_2_has_the_known_number_of_rows(shared: Path) -> None:
    file = shared / "data" / "wikitext2-raw.test.txt"
    if not file.is_file():
        pytest.skip("needs ../shared/data/wikitext2-raw.test.txt, which is not next to this checkout")
    joined = wikitext_rows(calibration.read_text(file))
    assert len(joined.split("\n\n")) == 4358  # the number of rows of its test split; each row ends with a line feed
    assert joined.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


# ---- sequences of a text


def test_text_file_is_tokenized_once(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\n" * 500)
    ids = tokenizer(file.read_text())["input_ids"]
    actual = read_text(str(file), tokenizer, 32).windows
    assert actual.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert actual.flatten().tolist().count(BOS) == 1


def test_wikitext_file_is_joined_first(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" = Title = \n \n Text . \n")
    [joined] = read_text(str(file), tokenizer, 26, wikitext=True).windows
    assert tokenizer.decode(joined[1:]) == " = Title = \n\n\n\n\n Text . \n"
    [plain] = read_text(str(file), tokenizer, 24).windows
    assert tokenizer.decode(plain[1:]) == " = Title = \n \n Text . \n"


def test_documents_are_tokenized_in_order(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    texts = [f"Document {number}." for number in range(10)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    actual = read_text(str(file), tokenizer, 12).windows.flatten().tolist()
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert actual == expected[: len(expected) // 12 * 12]
    assert actual.count(BOS) == 10


def test_dataset_rows_are_joined_with_blank_rows(tokenizer: Any, tmp_path: Path) -> None:
    """WikiText perplexities are comparable only with its 1,467 blank rows."""
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a dataset needs pyarrow")
    parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", "", " Text . \n"]}), tmp_path / "test.parquet")
    [actual] = read_text(f"{tmp_path}::test:text", tokenizer, 28).windows
    assert tokenizer.decode(actual[1:]) == "\n\n = Title = \n\n\n\n\n Text . \n"


def test_long_dataset_is_read_completely(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a dataset needs pyarrow")
    rows = 4358  # of the test split of WikiText-2
    assert sources.HUB_DOCUMENTS < rows
    parquet.write_table(pyarrow.table({"text": ["a"] * rows}), tmp_path / "test.parquet")
    actual = read_text(f"{tmp_path}::test:text", tokenizer, 1).windows
    assert len(actual) == 1 + rows + 2 * (rows - 1)  # BOS, one letter per row, two line feeds between rows


def test_number_of_sequences_can_be_limited(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word " * 100)
    assert len(read_text(str(file), tokenizer, 50).windows) == 10
    windows = read_text(str(file), tokenizer, 50).windows
    assert torch.equal(read_text(str(file), tokenizer, 50, limit=3).windows, windows[:3])


def test_text_shorter_than_a_sequence_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word")
    with pytest.raises(CalibrationError, match=r"holds 5 tokens, fewer than one sequence of 50") as caught:
        read_text(str(file), tokenizer, 50)
    assert "--seqlen" in caught.value.hint


# ---- documents


def test_tokens_know_their_document(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", " ", "defghi", "j")))
    text = read_text(str(file), tokenizer, 4)
    assert text.unit == "documents"
    assert text.documents.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 2]]  # each has a beginning-of-text token
    assert read_text(str(file), tokenizer, 4, limit=1).documents.tolist() == [[0, 0, 0, 0]]


def test_plain_text_has_a_document_per_sequence(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("12345")
    text = read_text(str(file), tokenizer, 3)
    assert (text.unit, text.documents.tolist()) == ("sequences", [[0, 0, 0], [1, 1, 1]])


def test_articles_of_wikitext_are_documents(tokenizer: Any, tmp_path: Path) -> None:
    """A section title is not the title of an article, and neither is a row of text between equals signs."""
    file = tmp_path / "wiki.txt"
    rows = [" \n", " = One = \n", " \n", " Text . \n", " = x = \n", " \n", " = = Section = = \n", " \n", " More . \n"]
    file.write_text("".join([*rows, " \n", " = Two = \n", " \n", " Text . \n"]))
    text = read_text(str(file), tokenizer, 1, wikitext=True)
    second = [token for row, owner in zip(text.windows, text.documents, strict=True) if owner == 1 for token in row]
    assert (text.unit, text.documents.unique().tolist()) == ("documents", [0, 1])
    assert tokenizer.decode(second) == " = Two = \n\n\n\n\n Text . \n"


def test_wikitext_2_has_60_articles(shared: Path, tokenizer: Any) -> None:
    file = shared / "data" / "wikitext2-raw.test.txt"
    if not file.is_file():
        pytest.skip("needs ../shared/data/wikitext2-raw.test.txt, which is not next to this checkout")
    assert len(read_text(str(file), tokenizer, 512, wikitext=True).documents.unique()) == 60


# ---- names


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("code=data/a.jsonl", "code", "data/a.jsonl"),
        ("c4 en=allenai/c4:en:train:text", "c4 en", "allenai/c4:en:train:text"),
        ("data/a.jsonl", "data/a.jsonl", "data/a.jsonl"),
        ("data/a=b.txt", "data/a=b.txt", "data/a=b.txt"),
        ("allenai/c4:a=b", "allenai/c4:a=b", "allenai/c4:a=b"),
    ],
)
def test_text_may_have_a_name(text: str, name: str, source: str) -> None:
    assert named(text) == (name, source)


def test_existing_file_with_an_equals_sign_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text("text")
    assert named("a=b.txt") == ("a=b.txt", "a=b.txt")


def test_texts_are_read_once_and_need_different_names(tokenizer: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("some words")
    read = read_texts([f"one={files[0]}", files[1], files[1]], tokenizer, 4, wikitext=False, limit=None)
    assert [(text.name, text.source) for text in read] == [("one", str(files[0])), (str(files[1]), str(files[1]))]
    with pytest.raises(ConfigError, match="two texts have the name one"):
        read_texts([f"one={files[0]}", f"one={files[1]}"], tokenizer, 4, wikitext=False, limit=None)
