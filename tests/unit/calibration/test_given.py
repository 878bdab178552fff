"""Calibration text given in Python: which values are names, texts, chats and token ids."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llmq.calibration import given
from llmq.calibration.chats import Chat
from llmq.calibration.documents import Tokens
from llmq.calibration.given import from_python
from llmq.errors import CalibrationError

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
CHAT = Chat(tuple(MESSAGES))


def documents(calibration: Any) -> list[Any]:
    name, contents = from_python(calibration)
    assert list(contents) == [name] and name.startswith("python-")
    return [document.content for document in contents[name].documents]


@pytest.mark.parametrize(
    "names",
    [
        None, "self", Path("text.txt"), "a text in one string is a name, too", ["a.txt", "b.jsonl:text:0.5"], [],
        ["allenai/c4:en:train:text:0.3", "self:0.2"], [Path("my notes.txt")], ["a.txt:0.5 self:0.5"],
    ],
)  # fmt: skip
def test_names_are_passed_on(names: Any) -> None:
    assert from_python(names) == (names, {})


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        (["def f(x): …\n" * 400, "short"], ["def f(x): …\n" * 400, "short"]),
        (["two words", "one"], ["two words", "one"]),
        (["这是一个句子"], ["这是一个句子"]),
        ([MESSAGES, {"messages": MESSAGES}], [CHAT, CHAT]),
        ([{"text": "a"}, {"text": "b"}], ["a", "b"]),
        ([[1, 2, 3], (4, 5)], [Tokens((1, 2, 3)), Tokens((4, 5))]),
        (torch.tensor([[1, 2], [3, 4]]), [Tokens((1, 2)), Tokens((3, 4))]),
        (datasets.Dataset.from_dict({"text": ["a", "b"]}), ["a", "b"]),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}), [Tokens((1, 2))]),
        (datasets.Dataset.from_list([{"messages": MESSAGES}]), [CHAT]),
        (iter(["two words", "and more"]), ["two words", "and more"]),
    ],
    ids=["texts", "few words", "other scripts", "chats", "rows", "token ids", "tensor", "dataset", "tokenized dataset",
         "dataset of chats", "iterator"],
)  # fmt: skip
def test_contents(calibration: Any, expected: list[Any]) -> None:
    assert documents(calibration) == expected


def test_a_large_dataset_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "ROWS", 4)
    rows = [f"text {number}" for number in range(10)]
    assert documents(datasets.Dataset.from_dict({"text": rows})) == rows[::3]


def test_the_name_depends_on_the_contents() -> None:
    names = {from_python(texts)[0] for texts in (["a b"], ["a b"], ["a c"], [[1, 2]], ["[1, 2] "])}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (3, "is a int"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), "is a DatasetDict"),
        ([" ", "\n"], "is empty"),
        ([[1, -2]], "token id -2"),
        ([3.5], "expected a text"),
        ([{"label": 1}], "expected a text or the column"),
    ],
    ids=["number", "several splits", "blank", "negative id", "floats", "no text"],
)
def test_what_is_no_text_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        from_python(calibration)
    assert caught.value.hint
