"""Files as they come from other systems: byte order marks, line ends, texts without blank lines, both forms of JSON."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq import calibration
from llmq.calibration import files

TEXTS = ["one text", "another text\nof two lines", "a third one"]
ROWS = [{"text": text} for text in TEXTS]


# ---- plain text


def test_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "x" * 700 for number in range(8)]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(paragraphs))
    documents = calibration.read_documents(str(file))
    assert documents == ["\n\n".join(paragraphs[start : start + 3]) for start in (0, 3, 6)]
    assert calibration.read_source(str(file)).text == file.read_text()


def test_small_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One.\n\nTwo.\n")
    assert calibration.read_documents(str(tmp_path / "text.txt")) == ["One.\n\nTwo.\n"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaaa\nbbbb\n \t\n\ncccc", ["aaaa\nbbbb", "cccc"]),  # a line of blanks is a blank line
        ("aaaa bb\nbbbb bbbb", ["aaaa bb", "bbbb bbbb"]),
        ("aaaa bbbb bbbb bbbb", ["aaaa", "bbbb bbbb bbbb"]),
        ("aaaa bb\nbbbb", ["aaaa bb\nbbbb"]),
        ("a" * 30, ["a" * 16, "a" * 14]),
        ("aaa", ["aaa"]),
        ("aaaaa\n\n", ["aaaaa"]),
        ("", []),
    ],
)
def test_text_is_cut_at_the_best_place(text: str, expected: list[str]) -> None:
    """Pieces of 4 to 16 characters: at a blank line, at a line end, at a space, in the middle of a word."""
    assert files.pieces(text, 4) == expected


def test_text_without_blank_lines_is_cut_by_length(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("A line of words.\n" * 2000)
    lengths = [len(document) for document in calibration.read_documents(str(file))]
    assert len(lengths) == 14 and max(lengths) <= files.LONGEST * files.SHORTEST_PIECE


def test_cutting_takes_time_in_proportion_to_the_length() -> None:
    assert len(files.pieces("x" * 10_000_000)) == 1250


# ---- marks and line ends

CONTENTS: dict[str, str] = {
    "txt": "\n\n".join(f"Text {number}. " * 300 for number in range(3)),
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS, indent=2),
}


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_marks_and_line_ends_of_other_systems_change_nothing(
    suffix: str, mark: bytes, end: str, tmp_path: Path
) -> None:
    file, plain = tmp_path / f"text.{suffix}", tmp_path / f"plain.{suffix}"
    file.write_bytes(mark + CONTENTS[suffix].replace("\n", end).encode())
    plain.write_text(CONTENTS[suffix], newline="\n")
    assert calibration.read_source(str(file)) == calibration.read_source(str(plain))
    assert len(calibration.read_documents(str(file))) == 3


def test_mark_in_the_middle_of_joined_files_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join("\ufeff" + json.dumps({"text": "\ufeff" + text}) for text in TEXTS), encoding="utf-8")
    assert calibration.read_documents(str(file)) == TEXTS


# ---- JSON


def as_lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def as_array(rows: list[Any]) -> str:
    return json.dumps(rows, indent=1)


def as_arrays(rows: list[Any]) -> str:
    return f"{json.dumps(rows[:2])}\n{json.dumps(rows[2:])}"


def as_columns(rows: list[Any]) -> str:
    return json.dumps({"text": [row["text"] for row in rows], "id": list(range(len(rows)))})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("write", [as_lines, as_array, as_arrays, as_columns], ids=lambda f: f.__name__)
def test_contents_decide_about_the_form_of_json(write: Callable[[list[Any]], str], suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    file.write_text(write(ROWS))
    assert calibration.read_documents(str(file)) == TEXTS


def test_one_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps(ROWS[1], indent=2))
    assert calibration.read_documents(str(tmp_path / "row.json")) == TEXTS[1:2]
