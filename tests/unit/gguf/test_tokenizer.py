"""Which tokenizer of llama.cpp is equivalent to a tokenizer.json."""

from typing import Any

import pytest

from llmq.errors import FormatError
from llmq.gguf import tokenizer

gguf = pytest.importorskip("gguf")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
# As in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def described(pre: Any, **model: Any) -> dict[str, Any]:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], **model},
        "pre_tokenizer": pre,
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<tool>"}],
    }


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (WORDS, "gpt-2"),
        (sequence(split(LLAMA3), BYTES), "llama-bpe"),
        (sequence(split(QWEN2), BYTES), "qwen2"),
        (sequence({"type": "Digits", "individual_digits": True}, WORDS), "smollm"),
    ],
)
def test_known_expressions_get_their_llama_cpp_name(pre: Any, name: str) -> None:
    vocabulary = tokenizer.read(described(pre, ignore_merges=name == "llama-bpe"), 6)
    assert (vocabulary.model, vocabulary.pre, vocabulary.notes) == ("gpt2", name, ())


@pytest.mark.parametrize(
    "pre",
    [
        sequence(split(QWEN2.replace(r"\s+(?!\S)", r"\s+(?=\S)")), BYTES),
        {**WORDS, "add_prefix_space": True},
        sequence({**split(QWEN2), "behavior": "MergedWithNext"}, BYTES),
        {"type": "BertPreTokenizer"},
    ],
)
def test_an_unknown_way_to_split_texts_is_refused(pre: Any) -> None:
    with pytest.raises(FormatError, match="it splits texts by"):
        tokenizer.read(described(pre), 6)


def test_a_note_reports_words_looked_up_before_merging() -> None:
    [note] = tokenizer.read(described(WORDS, ignore_merges=True), 6).notes
    assert "only by merging" in note


def test_every_embedding_row_has_a_token_and_a_type() -> None:
    vocabulary = tokenizer.read(described(WORDS), 6)
    assert vocabulary.tokens == ("a", "b", "ab", "<s>", "<tool>", "[PAD5]")
    kinds = [gguf.TokenType(kind).name for kind in vocabulary.types]
    assert kinds == ["NORMAL", "NORMAL", "NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"]


def test_tokens_without_a_row_are_left_out_and_named() -> None:
    vocabulary = tokenizer.read(described(WORDS), 4)
    assert len(vocabulary.tokens) == 4
    assert any("<tool>" in note for note in vocabulary.notes)


def test_sentencepiece_scores_order_tokens_like_merges() -> None:
    ids = {token: i for i, token in enumerate(["<unk>", "<0x0A>", "a", "b", "c", "bc", "ab", "abc"])}
    merges = ["a b", "b c", "ab c", "a bc"]
    model = {"type": "BPE", "vocab": ids, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    normalizer = {"type": "Prepend", "prepend": tokenizer.SPACE}
    unknown = [{"id": 0, "content": "<unk>", "special": True}]
    vocabulary = tokenizer.read({"model": model, "normalizer": normalizer, "added_tokens": unknown}, 8)
    assert (vocabulary.model, vocabulary.pre, vocabulary.space_prefix) == ("llama", "default", True)
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["ab"] > scores["bc"] > scores["abc"] > scores["a"]
    assert [gguf.TokenType(kind).name for kind in vocabulary.types[:3]] == ["UNKNOWN", "BYTE", "NORMAL"]


def test_models_other_than_bpe_are_refused() -> None:
    with pytest.raises(FormatError, match="its model is 'Unigram'"):
        tokenizer.read({"model": {"type": "Unigram", "vocab": []}}, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "NFKC"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "Strip"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}}, "Replace"),
        ({"model": {**described(WORDS)["model"], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix = '</w>'"),
        ({"model": {**described(WORDS)["model"], "byte_fallback": True}}, "it splits texts by"),
    ],
)
def test_changes_of_a_text_that_llama_cpp_does_not_make_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tokenizer.read({**described(WORDS), **changes}, 6)


def test_small_differences_are_reported() -> None:
    text = {**described(WORDS), "normalizer": {"type": "NFC"}}
    text["added_tokens"][1]["rstrip"] = True
    composed, spaces = tokenizer.read(text, 6).notes
    assert "NFC" in composed and "<tool>" in spaces
