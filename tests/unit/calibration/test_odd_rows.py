"""Rows as other tools leave them: each is read as the chat template sees it, or left out, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmq import calibration
from llmq.calibration import CalibrationSet, SourceRecord
from llmq.calibration.chats import Chat
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError
from llmq.evaluation.texts import read_text

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
ASKED, TOLD = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments.at }}>{% endfor %}"
    "{% endfor %}"
)
STRICT = "{% for message in messages %}{{ '[' + message.role + ']' + message.content }}{% endfor %}"


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


def only_chat(source: str) -> Chat:
    (document,) = calibration.read_source(source).documents
    assert isinstance(document.content, Chat)
    return document.content


def rendered(row: Any, tokenizer: Any, folder: Path, template: str = TEMPLATE) -> str:
    """The text of the template for the only row of a file."""
    chat = only_chat(write(folder / "row.jsonl", [row]))
    tokenizer.chat_template = template
    try:
        return chat.rendered(tokenizer)
    finally:
        tokenizer.chat_template = None


def load(tokenizer: Any, source: str) -> tuple[CalibrationSet, SourceRecord]:
    loaded = calibration.load(Calibration(sources=(source,), samples=100, seqlen=8), tokenizer, seed=0, max_tokens=None)
    return loaded, loaded.records[0]


# ---- chats that are read


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "<look sky>"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]}, "<look sky>"),
        ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}, "<look sky>"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": json.dumps([CALL])}]}, "<look sky>"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": None}]}, "Because."),
        ({"conversation": [ASKED, TOLD]}, "Because."),
        ({"messages": json.dumps([ASKED, TOLD])}, "Because."),
        ({"text": None, "messages": [ASKED, TOLD]}, "Because."),
        ({"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."]}}, "Because."),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Why?", "Because."]}}, "Because."),
        ({"messages": [ASKED, {**TOLD, "content": ["Be", {"type": "text", "text": "cause."}]}]}, "Because."),
        ({"messages": [ASKED, {**TOLD, "name": "Ann", "weight": 1}]}, "Because."),
    ],
)  # fmt: skip
def test_chat_is_read_as_the_template_sees_it(row: Any, expected: str, tokenizer: Any, tmp_path: Path) -> None:
    assert rendered(row, tokenizer, tmp_path) == "[user]Why?[assistant]" + expected


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_reach_the_template(tools: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert rendered({"messages": [ASKED], "tools": tools}, tokenizer, tmp_path) == "(look)[user]Why?"
    assert rendered({"messages": [ASKED], "tools": None}, tokenizer, tmp_path) == "[user]Why?"


def test_template_that_needs_a_content_gets_an_empty_one(tokenizer: Any, tmp_path: Path) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]}
    assert rendered(row, tokenizer, tmp_path, STRICT) == "[user]Why?[assistant]"


def test_pictures_are_left_out_and_reported(tokenizer: Any, tmp_path: Path) -> None:
    """Null is the text of a picture in a table, where all parts have the same keys."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    row = {"messages": [{"role": "user", "content": parts}, TOLD]}
    assert only_chat(write(tmp_path / "row.jsonl", [row])).contents == "What is this?\n\nBecause."
    loaded, record = load(tokenizer, write(tmp_path / "rows.jsonl", [row]))
    assert record.partial == 1 and any("not text, such as images" in note for note in loaded.notes)


def test_keys_that_only_arrow_added_do_not_reach_the_template(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading .parquet needs pyarrow")
    calls = [
        {"function": {"name": "look", "arguments": {"at": "sky"}}},
        {"function": {"name": "go", "arguments": {"to": "x"}}},
    ]
    rows = [[ASKED, {"role": "assistant", "tool_calls": calls}]]
    parquet.write_table(pyarrow.table({"messages": rows, "tools": [TOOLS]}), tmp_path / "rows.parquet")
    chat = only_chat(str(tmp_path / "rows.parquet"))
    assert chat.messages == (ASKED, {"role": "assistant", "tool_calls": calls})
    assert chat.tools == tuple(TOOLS)


# ---- rows that are left out

PLAIN = [{"text": f"A sentence about the number {number}."} for number in range(30)]
UNUSABLE = {
    "null": ({"text": None}, "holds null"),
    "no column": ({"id": 3, "body": "b"}, "holds the columns id, body, expected a text or the column text or"),
    "number": ({"text": 3}, "holds the int 3, expected a text or a list of messages"),
    "no messages": ({"messages": []}, r"holds \[\], expected a text or a list of messages"),
    "no list": ({"messages": {"a": 1}}, "expected a text or a list of messages"),
    "no objects": ({"messages": ["a"]}, "holds the message 'a', expected role and content"),
    "no role": ({"messages": [{"content": "a"}]}, "expected role and content"),
    "no text": ({"messages": [{"role": "user"}]}, "holds messages without text"),
    "odd content": ({"messages": [{"role": "user", "content": 3}]}, "whose content is 3"),
    "odd tools": ({"messages": [ASKED], "tools": "all"}, "holds tools 'all', expected a list"),
    "surrogate": (r'{"text": "half: \ud83d and more"}', "holds half of a surrogate pair, U[+]D83D"),
    "surrogate in a chat": (
        r'{"messages": [{"role": "user", "content": "half: \ud83d"}]}', "holds half of a surrogate pair"
    ),
    "digits": ('{"text": "a", "n": ' + "9" * 5000 + "}", "cannot be read as JSON: Exceeds the limit"),
    "deep": ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    "deep chat": ('{"messages": [{"role": "user", "content": "a", "b": ' + "[" * 900 + "]" * 900 + "}]}", ""),
    "cut off": ('{"text": "a', "is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_one_odd_row_never_ends_a_run(row: Any, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    good = load(tokenizer, write(tmp_path / "good.jsonl", PLAIN))[0]
    file = write(tmp_path / "rows.jsonl", [*PLAIN[:20], row, *PLAIN[20:]])
    loaded, record = load(tokenizer, file)
    if not reason and not record.unusable:
        return  # whether it can be read depends on the Python
    assert (record.documents, record.unusable, record.read) == (31, 1, 30)
    assert loaded.sha256 == good.sha256
    [(name, why)] = record.to_dict()["left_out"].items()
    assert name == "line 21"
    with pytest.raises(CalibrationError, match=f"1 of 1 rows of .* cannot be used: line 1 .*{reason}") as caught:
        load(tokenizer, write(tmp_path / "only.jsonl", [row]))
    assert why in str(caught.value) and "role and content" in caught.value.hint
    assert any(note.startswith(f"{file}: 1 of 31 rows hold neither") and why in note for note in loaded.notes)


def test_more_than_a_tenth_of_odd_rows_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    odd = [{"text": None}] * 3
    assert load(tokenizer, write(tmp_path / "rows.jsonl", [*PLAIN[:27], *odd]))[1].unusable == 3
    with pytest.raises(CalibrationError, match=r"3 of 29 rows of .*rows.jsonl cannot be used: line 27 holds null"):
        load(tokenizer, write(tmp_path / "rows.jsonl", [*PLAIN[:26], *odd]))


def test_text_of_a_table_that_is_not_utf_8_is_one_odd_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading .parquet needs pyarrow")
    texts = pyarrow.array([b"fine"] * 10 + [b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    contents = calibration.read_source(str(tmp_path / "rows.parquet"))
    assert len(contents.documents) == 10 and "can't decode" in contents.unusable["row 10"]


def test_evaluation_reports_rows_that_were_left_out(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*PLAIN, {"text": None}])
    expected = (
        f"{file}: 1 of 31 rows hold neither a text nor a chat and were left out, for example line 31, which holds"
    )
    assert read_text(file, tokenizer, 16).notes[0].startswith(expected)
    assert read_text(write(tmp_path / "good.jsonl", PLAIN), tokenizer, 16).notes == ()
