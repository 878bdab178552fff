"""Text into sequences: every kind of file, nothing lost or padded, and a seed that determines the tokens."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import calibration
from llmq.calibration import CalibrationSet
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError

BOS = 1
TEXTS = [f"Story {number}: " + "word " * number + "ende." for number in range(12)]


def json_lines(folder: Path, texts: list[str], column: str | None = "text", name: str = "text.jsonl") -> Path:
    rows = [text if column is None else {column: text, "n": 1} for text in texts]
    file = folder / name
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return file


def load(tokenizer: Any, *files: Path, samples: int = 1000, seqlen: int = 16, seed: int = 0) -> CalibrationSet:
    settings = Calibration(sources=tuple(map(str, files)), samples=samples, seqlen=seqlen, packing=True)
    return calibration.load(settings, tokenizer, seed=seed, max_tokens=None)


# ---- files


def as_json_lines(folder: Path) -> Path:
    return json_lines(folder, TEXTS)


def as_bare_json_lines(folder: Path) -> Path:
    return json_lines(folder, TEXTS, None)


def as_content(folder: Path) -> Path:
    return json_lines(folder, TEXTS, "content")


def as_json(folder: Path) -> Path:
    (folder / "text.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return folder / "text.json"


def as_bare_json(folder: Path) -> Path:
    (folder / "text.json").write_text(json.dumps(TEXTS))
    return folder / "text.json"


def as_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading .parquet needs pyarrow")
    parquet.write_table(pyarrow.table({"n": list(range(12)), "text": TEXTS}), folder / "text.parquet")
    return folder / "text.parquet"


@pytest.mark.parametrize(
    "write",
    [as_json_lines, as_bare_json_lines, as_content, as_json, as_bare_json, as_parquet],
    ids=lambda f: f.__name__,
)
def test_every_kind_of_file_gives_its_documents(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert calibration.read_documents(str(write(tmp_path))) == TEXTS


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    assert calibration.read_documents(str(json_lines(tmp_path, ["", "one", " \n", "two"]))) == ["one", "two"]


def test_only_a_line_feed_ends_a_line_of_json(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and U+0085, which other line readers treat as line ends."""
    texts = ["before\u2028after", "before\u0085after", "before\x0cafter"]
    file = tmp_path / "text.jsonl"
    file.write_bytes("\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode() + b"\n\n")
    assert calibration.read_documents(str(file)) == texts


def test_existing_path_may_hold_a_colon(tmp_path: Path) -> None:
    file = json_lines(tmp_path, TEXTS, name="a:b.jsonl")
    assert calibration.read_documents(str(file)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.txt", b"", "holds no text"),
        ("text.txt", b" \n\n ", "holds no text"),
        ("text.jsonl", b"", "holds no text"),
        ("text.json", b"[]", "holds no text"),
        ("text.txt", b"caf\xe9", r"is not UTF-8 text: byte 0xe9 at offset 3"),
        ("text.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "is not UTF-8 text"),
        ("text.jsonl", b'{"text": "a"}\n\n{"text": \n', r"1 of 2 rows of .*text\.jsonl .* line 3 is not valid JSON"),
        ("text.json", b'[{"text": "a"}', "is not valid JSON"),
        ("text.json", b'["a", 4]', "1 of 2 rows of .*: row 1 holds the int 4, expected a text"),
        ("text.json", b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", "cannot be read as JSON: Exceeds the limit"),
        ("text.json", b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        ("text.json", b"null", "1 of 1 rows .* holds null, expected a text"),
        ("text.parquet", b"PAR1 no more", "cannot be read as parquet"),
    ],
)
def test_invalid_file_raises_error_with_the_place(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        calibration.read_documents(str(tmp_path / name))


def test_parquet_file_without_a_text_column_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading .parquet needs pyarrow")
    parquet.write_table(pyarrow.table({"story": TEXTS}), tmp_path / "text.parquet")
    with pytest.raises(CalibrationError, match="the columns story, expected a text or the column text or content"):
        calibration.read_documents(str(tmp_path / "text.parquet"))


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl", "nowhere.parquet"])
def test_missing_file_raises_error_with_known_suffixes(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"{name} does not exist") as caught:
        calibration.read_documents(str(tmp_path / name))
    assert ".jsonl" in caught.value.hint


# ---- datasets


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder of parquet files, like a dataset on the Hub."""
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a dataset needs pyarrow")
    parquet.write_table(pyarrow.table({"story": ["one", "", "two"], "text": ["1", "2", "3"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"story": ["three"], "text": ["4"]}), tmp_path / "b.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("specification", "rows"),
    [
        ("{}:::story", ["one", "two", "three"]),
        ("{}::train:story", ["one", "two", "three"]),
        ("{}:default:train:story", ["one", "two", "three"]),
        ("{}::train", ["1", "2", "3", "4"]),
        ("{}", ["1", "2", "3", "4"]),
    ],
)
def test_dataset_name_has_configuration_split_and_column(specification: str, rows: list[str], data_set: Path) -> None:
    assert calibration.read_documents(specification.format(data_set)) == rows


def test_dataset_rows_include_blank_ones_up_to_a_limit(data_set: Path) -> None:
    for limit, texts in ((10, ["one", "", "two", "three"]), (2, ["one", ""])):
        contents = calibration.read_source(f"{data_set}:::story", limit=limit)
        assert [document.content for document in contents.documents] == texts
        assert contents.text == "\n\n".join(texts)


@pytest.mark.parametrize(
    ("specification", "words"),
    [
        ("{}:::nothing", "row 0 .* the columns story, text, expected .*nothing"),
        ("{}::test:story", "cannot be read"),
        ("{}:other::story", "cannot be read"),
        ("{}/nowhere", "cannot be read"),
        ("{}:::story:more", "has 5 parts, expected at most four: name:config:split:column"),
    ],
)
def test_unreadable_dataset_is_refused(specification: str, words: str, data_set: Path) -> None:
    with pytest.raises(CalibrationError, match=words):
        calibration.read_documents(specification.format(data_set))


def test_missing_source_without_hub_suggests_a_file(tokenizer: Any) -> None:
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    with pytest.raises(
        CalibrationError, match="no calibration text was given, and the default text on the Hub cannot be read"
    ) as caught:
        calibration.load(Calibration(), tokenizer, seed=0, max_tokens=None)
    assert "--calibration" in caught.value.hint


# ---- packing


def stream_by_hand(texts: list[str], seed: int) -> list[int]:
    """The tokens of all documents in the drawn order, each after a BOS token; every byte is a token."""
    drawn = list(texts)
    random.Random(seed).shuffle(drawn)
    ids: list[int] = []
    for text in drawn:
        ids += [BOS, *(byte_token(byte) for byte in text.encode())]
    return ids


def byte_token(byte: int) -> int:
    """Printable ASCII comes first in the byte-level alphabet, sorted, from "!"; a space is written as U+0120."""
    order = sorted(chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])
    return 3 + order.index("\u0120" if byte == 32 else chr(byte))


@pytest.mark.parametrize("seqlen", [1, 7, 16, 100])
def test_only_tokens_of_the_incomplete_sequence_are_lost(seqlen: int, tokenizer: Any, tmp_path: Path) -> None:
    loaded = load(tokenizer, json_lines(tmp_path, TEXTS), seqlen=seqlen)
    ids = stream_by_hand(TEXTS, seed=0)
    assert loaded.windows.shape == (len(ids) // seqlen, seqlen) and loaded.windows.dtype == torch.int64
    assert loaded.windows.flatten().tolist() == ids[: len(ids) // seqlen * seqlen]
    assert loaded.notes == (f"{len(loaded.windows)} sequences instead of 1000: the text is too short",)


def test_every_document_has_one_bos_token(tokenizer: Any, tmp_path: Path) -> None:
    ids = load(tokenizer, json_lines(tmp_path, TEXTS), seqlen=1).windows.flatten().tolist()
    begins = [index for index, token in enumerate(ids) if token == BOS]
    assert len(begins) == len(TEXTS) and begins[0] == 0
    decoded = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
    assert sorted(decoded) == sorted(TEXTS)


def test_tokenizer_without_bos_adds_none(tokenizer: Any, tmp_path: Path) -> None:
    def bare(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    assert BOS not in load(bare, json_lines(tmp_path, TEXTS)).windows


def test_only_the_necessary_text_is_tokenized(tokenizer: Any, tmp_path: Path) -> None:
    read: list[str] = []

    def recording(text: str, verbose: bool) -> Any:
        read.append(text)
        return tokenizer(text, verbose=verbose)

    loaded = load(recording, json_lines(tmp_path, TEXTS), samples=2, seqlen=8)
    assert loaded.windows.shape == (2, 8) and loaded.notes == ()
    assert len(read) < len(TEXTS)


def test_sequence_is_not_longer_than_the_context(tokenizer: Any, tmp_path: Path) -> None:
    settings = Calibration(sources=(str(json_lines(tmp_path, TEXTS)),), samples=4, seqlen=64)
    loaded = calibration.load(settings, tokenizer, seed=0, max_tokens=16)
    assert loaded.windows.shape == (4, 16)
    assert loaded.notes == ("sequences have 16 tokens instead of 64: the context of the model is limited",)


def test_seed_determines_the_sequences(tokenizer: Any, tmp_path: Path) -> None:
    file = json_lines(tmp_path, TEXTS)
    first, again, other = (load(tokenizer, file, samples=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.windows, again.windows) and first.sha256 == again.sha256
    assert not torch.equal(first.windows, other.windows) and first.sha256 != other.sha256


def test_digest_is_that_of_little_endian_ids(tokenizer: Any, tmp_path: Path) -> None:
    loaded = load(tokenizer, json_lines(tmp_path, TEXTS), samples=3)
    raw = b"".join(int(token).to_bytes(8, "little") for token in loaded.windows.flatten())
    assert loaded.sha256 == hashlib.sha256(raw).hexdigest()


def test_several_sources_share_the_sequences_evenly(tokenizer: Any, tmp_path: Path) -> None:
    files = [json_lines(tmp_path, [letter * 400] * 3, name=f"{letter}.jsonl") for letter in "ab"]
    loaded = load(tokenizer, *files, samples=8, seqlen=16)
    letters = "".join(tokenizer.decode(window[-1:]) for window in loaded.windows)
    assert sorted(letters) == list("aaaabbbb")
    assert letters != "aaaabbbb"
    again, other = (load(tokenizer, *files, samples=8, seqlen=16, seed=seed) for seed in (0, 1))
    assert torch.equal(loaded.windows, again.windows) and not torch.equal(loaded.windows, other.windows)


def test_short_text_raises_error_with_both_lengths(tokenizer: Any, tmp_path: Path) -> None:
    file = json_lines(tmp_path, ["short"])
    with pytest.raises(CalibrationError, match=r"holds 6 tokens, fewer than one sequence of 7") as caught:
        load(tokenizer, file, seqlen=7)
    assert "--calibration" in caught.value.hint and "--seqlen" in caught.value.hint
    assert load(tokenizer, file, seqlen=6).windows.shape == (1, 6)


def test_record_describes_the_read_text(tokenizer: Any, tmp_path: Path) -> None:
    file = json_lines(tmp_path, TEXTS)
    loaded = load(tokenizer, file, samples=3)
    written = loaded.to_dict()
    assert [record["source"] for record in written.pop("manifest")] == [str(file)]
    assert written == {
        "sources": [str(file)], "samples": 3, "seqlen": 16, "tokens": 48, "sha256": loaded.sha256, "packing": True,
        "notes": [],
    }  # fmt: skip
    json.dumps(loaded.to_dict())
