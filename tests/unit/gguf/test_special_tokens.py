"""What the tokenizer of transformers does is written, whichever file it has it from."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmq.errors import CheckpointError, FormatError
from llmq.gguf.tokenizer import add_tokenizer

gguf = pytest.importorskip("gguf")
ROWS = 8
CONFIG = {"bos_token_id": None, "eos_token_id": 1}


def save(folder: Path, template: str | None = None, single: str = "<s> $A") -> None:
    """A byte-level tokenizer of the ids 0 to 4, where a text begins with <s>."""
    made = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def keys(folder: Path, config: dict[str, Any] = CONFIG) -> tuple[dict[str, Any], tuple[str, ...]]:
    writer = gguf.GGUFWriter(None, "test")
    notes = add_tokenizer(writer, folder, config, ROWS).notes
    return {name.removeprefix("tokenizer."): entry.value for name, entry in writer.kv_data[0].items()}, notes


def test_ids_and_merges(tmp_path: Path) -> None:
    save(tmp_path)
    written, notes = keys(tmp_path)
    assert (written["ggml.bos_token_id"], written["ggml.eos_token_id"]) == (0, 1)
    assert (written["ggml.add_bos_token"], written["ggml.add_eos_token"]) == (True, False)
    assert written["ggml.merges"] == ["a b"] and "chat_template" not in written and notes == ()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_a_token_that_only_another_file_adds_is_in_the_file(place: str, tmp_path: Path) -> None:
    save(tmp_path)
    if place == "added_tokens.json":
        (tmp_path / place).write_text(json.dumps({"<think>": 5}))
    else:
        edit(tmp_path / place, added_tokens_decoder={"5": {"content": "<think>", "special": True}})
    assert keys(tmp_path)[0]["ggml.tokens"][5:7] == ["<think>", "[PAD6]"]


def test_the_template_file_comes_before_an_older_setting(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template="old")
    assert keys(tmp_path)[0]["chat_template"] == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert keys(tmp_path)[0]["chat_template"] == "new"


def test_all_tokens_that_end_a_turn_are_written(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1, 4, 2]}))
    written, notes = keys(tmp_path)
    ends = [written[f"ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ends == [1, 3, 4] and "does not stop at [2]" in notes[0]


def test_the_configuration_has_the_ends_without_generation_settings(tmp_path: Path) -> None:
    save(tmp_path)
    written, _ = keys(tmp_path, {**CONFIG, "eos_token_id": [3, 1]})
    assert (written["ggml.eos_token_id"], written["ggml.eot_token_id"]) == (1, 3)


def test_other_tokens_around_a_text_are_refused(tmp_path: Path) -> None:
    save(tmp_path, single="</s> <s> $A")
    with pytest.raises(FormatError, match="can add only"):
        keys(tmp_path)


def test_damaged_generation_settings_are_an_error(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        keys(tmp_path)
