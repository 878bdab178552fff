"""The manifest: counts of documents and tokens, and notes about problems."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmq import calibration
from llmq.calibration import CalibrationSet, SourceRecord
from llmq.calibration.manifest import scripts_of
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError

BOS = 1
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}" + TEMPLATE
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def write_rows(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(file)


def load(tokenizer: Any, *sources: str, samples: int = 100, seqlen: int = 8) -> CalibrationSet:
    settings = Calibration(sources=sources, samples=samples, seqlen=seqlen, packing=True)
    return calibration.load(settings, tokenizer, seed=0, max_tokens=None)


def only(loaded: CalibrationSet) -> SourceRecord:
    (record,) = loaded.records
    return record


def ids_of(loaded: CalibrationSet) -> list[int]:
    return [int(token) for token in loaded.windows.flatten()]


@pytest.fixture
def templated(tokenizer: Any) -> Any:
    """The tokenizer with a chat template, which is removed afterwards."""
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


# ---- counts


def test_manifest_counts_every_document_once(tokenizer: Any, tmp_path: Path) -> None:
    rows = ["one " * 4, "", "two " * 4, "one " * 4, " \n", *(f"{number} more" * 3 for number in range(20))]
    record = only(load(tokenizer, write_rows(tmp_path / "rows.jsonl", rows), samples=4))
    assert (record.documents, record.empty, record.duplicates, record.refused) == (25, 2, 1, 0)
    assert 0 < record.read < 22
    assert record.windows == record.wanted == 4 and record.tokens == 32


def test_duplicates_are_read_once_and_reported(tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["abcdefg", "hijklmn", "abcdefg", "abcdefg"])
    loaded = load(tokenizer, file)
    assert loaded.windows.shape == (2, 8)
    assert f"{file}: 2 of 4 documents are duplicates; each text was read once" in loaded.notes


def test_document_of_an_earlier_source_is_a_duplicate(tokenizer: Any, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", ["abcdefg"])
    second = write_rows(tmp_path / "b.jsonl", ["abcdefg", "hijklmn"])
    records = load(tokenizer, first, second).records
    assert [record.duplicates for record in records] == [0, 1]
    assert [record.windows for record in records] == [1, 1]


def test_manifest_counts_dropped_tokens(tokenizer: Any, tmp_path: Path) -> None:
    record = only(load(tokenizer, write_rows(tmp_path / "rows.jsonl", ["a" * 17, "b" * 1])))
    assert (record.tokens, record.dropped_tokens, record.truncated) == (16, 4, record.truncated)
    assert record.truncated in (1, 2)  # depends on which document the seed draws last
    whole = only(load(tokenizer, write_rows(tmp_path / "more.jsonl", ["a" * 7, "b" * 7])))
    assert (whole.tokens, whole.dropped_tokens, whole.truncated) == (16, 0, 0)


def test_manifest_has_characters_per_token(tokenizer: Any, tmp_path: Path) -> None:
    record = only(load(tokenizer, write_rows(tmp_path / "rows.jsonl", ["\u00e4" * 12])))
    assert record.characters_per_token == 12 / 25  # two bytes per letter, one token per byte, one BOS token


def test_scripts_are_fractions_of_all_letters() -> None:
    loaded = dict(scripts_of(["abc \u0414\u0430, 12", "\u6f22\u5b57 \u3042 \uff21"]))
    assert loaded == {"Latin": pytest.approx(4 / 9, abs=1e-4), "Cyrillic": pytest.approx(2 / 9, abs=1e-4),
                     "Han": pytest.approx(2 / 9, abs=1e-4), "Hiragana": pytest.approx(1 / 9, abs=1e-4)}  # fmt: skip
    assert scripts_of(["1 + 1", ""]) == ()


# ---- the beginning of a text


def test_doubled_bos_token_is_removed_and_reported(tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["<s>abcdefg", "hijklmn"])
    loaded = load(tokenizer, file)
    assert loaded.windows[:, 0].tolist() == [BOS, BOS] and ids_of(loaded).count(BOS) == 2
    assert (
        f"{file}: 1 of 2 documents start with the token that the tokenizer adds; the second one was removed"
        in loaded.notes
    )


# ---- chats


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CHAT[1]]},
        CHAT,
    ],
    ids=["messages", "conversations", "parts", "bare"],
)
def test_chat_is_read_through_the_template(row: Any, templated: Any, tmp_path: Path) -> None:
    loaded = load(templated, write_rows(tmp_path / "chats.jsonl", [row]), seqlen=1)
    assert templated.decode(ids_of(loaded)) == "<s>[user]Why?[assistant]Because."
    assert ids_of(loaded).count(BOS) == 1  # from the template; the tokenizer adds none
    assert only(loaded).chats == 1 and only(loaded).untemplated == 0


def test_chat_without_template_is_plain_text_and_reported(tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    loaded = load(tokenizer, file, seqlen=1)
    assert tokenizer.decode(ids_of(loaded)) == "<s>Why?\n\nBecause."
    assert f"{file}: 1 of 1 chats were read as plain text: the tokenizer has no chat template" in loaded.notes


def test_refused_chat_is_left_out_with_the_reason(tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[::-1]}])
    tokenizer.chat_template = STRICT
    try:
        loaded = load(tokenizer, file)
        with pytest.raises(CalibrationError, match="fewer than one sequence .*a user speaks first"):
            load(tokenizer, write_rows(tmp_path / "none.jsonl", [{"messages": CHAT[::-1]}]))
    finally:
        tokenizer.chat_template = None
    assert only(loaded).refused == 1 and only(loaded).read == 1
    assert only(loaded).left_out == (("line 2", "is refused by the chat template: a user speaks first"),)
    assert any("1 of 2 chats were left out" in note and "a user speaks first" in note for note in loaded.notes)


def test_evaluation_refuses_chats(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds chats, expected texts"):
        calibration.read_documents(write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}]))


def test_record_is_json(tokenizer: Any, tmp_path: Path) -> None:
    loaded = load(tokenizer, write_rows(tmp_path / "rows.jsonl", ["some text, long enough"]))
    record = json.loads(json.dumps(loaded.to_dict()))["manifest"][0]
    assert SimpleNamespace(**record).scripts == {"Latin": 1.0}
    assert record["sha256"] == loaded.sha256  # the only source, so in order
