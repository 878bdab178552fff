"""`llmq verify` checks the files next to the weights, with checksums of llmq and without."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llmq
from llmq.verification.integrity import Integrity, examine
from tests import builders

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE = "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def original(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    shutil.copytree(checkpoint("llama", num_hidden_layers=1), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_p": 0.9}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "README.md").write_text("# A model")
    return folder


@pytest.fixture(scope="module")
def packed(original: Path) -> Path:
    out = original.parent / "packed"
    llmq.quantize(original, out, method="rtn", group_size=16)
    return out


def damaged(model: Path, to: Path, change: Callable[[Path], object]) -> Integrity:
    shutil.copytree(model, to)
    change(to)
    return examine(to)


def test_undamaged_models_have_no_problems(original: Path, packed: Path) -> None:
    assert examine(original).problems == [] == examine(packed).problems
    assert examine(packed).checksums == len(FILES) + 1


@pytest.mark.parametrize("name", FILES)
def test_one_changed_character_is_noticed(name: str, packed: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        at = data.index(b"e")
        (folder / name).write_bytes(data[:at] + b"o" + data[at + 1 :])

    problems = damaged(packed, tmp_path / "model", change).problems
    assert any(f"{name} has changed" in problem for problem in problems) or name == "config.json" and problems


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_noticed(name: str, packed: Path, tmp_path: Path) -> None:
    problems = damaged(packed, tmp_path / "model", lambda folder: (folder / name).unlink()).problems
    assert any(name in problem for problem in problems)


def test_card_may_be_edited(packed: Path, tmp_path: Path) -> None:
    integrity = damaged(packed, tmp_path / "model", lambda folder: (folder / "README.md").write_text("# Mine"))
    assert integrity.problems == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", '{"model": ', "tokenizer.json is not JSON"),
        ("tokenizer.json", "{}", "the tokenizer in"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list"),
        ("generation_config.json", '{"temperature": ', "generation_config.json is not JSON"),
        ("chat_template.jinja", "{% for message in messages %}", "is not a valid template"),
    ],
)
def test_damage_is_noticed_without_checksums(
    name: str, content: str, words: str, original: Path, tmp_path: Path
) -> None:
    integrity = damaged(original, tmp_path / "model", lambda folder: (folder / name).write_text(content))
    assert any(words in problem for problem in integrity.problems), integrity.problems


def test_model_without_tokenizer_is_noted(original: Path, tmp_path: Path) -> None:
    def remove(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()

    integrity = damaged(original, tmp_path / "model", remove)
    assert integrity.problems == [] and any("has no tokenizer" in note for note in integrity.notes)


@pytest.mark.parametrize("name", ["../secret.txt", "/dev/zero", "C:/secret.txt"])
def test_checksums_of_files_outside_are_not_compared(name: str, packed: Path, tmp_path: Path) -> None:
    integrity = damaged(
        packed, tmp_path / "model", lambda folder: builders.change_json(folder / "llmq.json", checksums={name: "0"})
    )
    assert integrity.problems == [f"llmq.json lists {name!r}, which is not in the folder of the model"]


@pytest.mark.parametrize(
    "record", ['{"blocks": 3}', '{"checksums": []}', "[]", '{"calibration": {"samples": "x"}}', "["]
)
def test_damaged_record_is_refused(record: str, packed: Path, tmp_path: Path) -> None:
    integrity = damaged(packed, tmp_path / "model", lambda folder: (folder / "llmq.json").write_text(record))
    assert any("is not a record of llmq" in problem for problem in integrity.problems)
