"""The tokenizer of a model in the form that llama.cpp reads.

llama.cpp has its own tokenizers.  Two of them are used here: "gpt2", byte-level BPE with merges, and "llama", which
joins the pair with the highest score first (SentencePiece's BPE).  tokenizer.json shows which of them a model has.

Byte-level BPE splits a text into words before merging.  The rule is a regular expression in tokenizer.json, but in GGUF
it is a *name* (`tokenizer.ggml.pre`) of an expression in llama.cpp.  llama.cpp's converter finds the name by a hash of
a tokenized test text, so it supports only listed vocabularies.  llmq compares the expressions themselves, so it
supports every vocabulary with an expression that llama.cpp has.

A "llama" tokenizer without its SentencePiece file has no scores, but a list of merges sorted by priority.  The score of
a token is then minus the rank of the first merge that produces it, which gives the same order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmq.errors import FormatError
from llmq.gguf.special_tokens import REMEDY, add_special_tokens
from llmq.runtime.load import load_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space
BYTE_SPACE = chr(ord(" ") + 256)  # a space in the alphabet of byte-level BPE
NEVER = "[NEVER]"  # never occurs, because merging starts from single characters
UNMERGED, ADDED = -10000.0, -1000.0  # scores of tokens that no merge produces

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_START = "[^\\r\\n\\p{L}\\p{N}]?"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_SLASHES = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

PRE: Mapping[tuple[str, ...], str] = MappingProxyType(
    {
        (_GPT2,): "gpt-2",
        ("\\p{N}", _GPT2): "smollm",
        (f"{_SUFFIX}|{_START}\\p{{L}}+|\\p{{N}}{{1,3}}{_REST}",): "llama-bpe",
        (f"{_SUFFIX}|{_START}\\p{{L}}+|\\p{{N}}{_REST}",): "qwen2",
        (
            f"{_SUFFIX}|{_START}[\\p{{L}}\\p{{M}}]+|\\p{{N}}| ?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*"
            "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        ): "qwen35",
        (f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\\p{{N}}{_SLASHES}",): "tekken",
        (
            f"{_START}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_START}{_UPPER}+{_LOWER}*{_SUFFIX}?|\\p{{N}}{{1,3}}{_SLASHES}",
        ): "gpt-4o",
    }
)
"""The regular expressions that split a text, in their order -> llama.cpp's name for them."""

WITHOUT_MERGING = frozenset({"llama-bpe", "tekken"})
"""The names for which llama.cpp looks a word up in the vocabulary before it tries merges (`ignore_merges`)."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how a text is tokenized.

    model   GGUF's tokenizer: "gpt2" or "llama"
    pre     the name of the rule that splits a text into words
    types   `gguf.TokenType`
    scores  for "llama"; empty for "gpt2"
    space_prefix  whether a space is put in front of a text ("llama")
    notes   differences from the tokenizer of the original model
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    space_prefix: bool = False
    notes: tuple[str, ...] = ()


def add_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any], rows: int) -> Vocabulary:
    """Write `tokenizer.*` for a model with `rows` rows in its embedding; returns what was written.

    Raises CheckpointError where there is no tokenizer, FormatError where llama.cpp has no equivalent one.
    """
    tokenizer = load_tokenizer(folder, remote_code=False)
    described = _description(tokenizer)
    vocabulary = read(described, rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "llama":
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(_merges(described) or [f"{NEVER} {NEVER}"])  # llama.cpp needs at least one
    notes = add_special_tokens(writer, tokenizer, folder, config, rows)
    return replace(vocabulary, notes=(*vocabulary.notes, *notes))


def read(described: Mapping[str, Any], rows: int) -> Vocabulary:
    """The content of a tokenizer.json as a vocabulary of `rows` tokens; raises FormatError where GGUF has none."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r}")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise _unknown(f"its model has {option} = {model[option]!r}")
    notes = [*_normalizer_notes(described), *_added_notes(described)]
    if model.get("byte_fallback") or _has_spaces_replaced(described):
        return _sentence_piece(described, rows, notes)
    pre = PRE.get(tuple(_splits(described.get("pre_tokenizer"))))
    if pre is None:
        shown = json.dumps(described.get("pre_tokenizer"), ensure_ascii=False)
        raise _unknown(f"it splits texts by {shown}, expected one of {', '.join(PRE.values())}")
    if bool(model.get("ignore_merges")) != (pre in WITHOUT_MERGING):
        notes.append(
            f"llama.cpp's tokenizer {pre!r} looks words up "
            f"{'before merging' if pre in WITHOUT_MERGING else 'only by merging'}, the tokenizer of the model does "
            "not: a few words may be tokenized differently"
        )
    tokens, types, left = _tokens(described, rows)
    return Vocabulary("gpt2", pre, tokens, types, notes=(*notes, *left))


def _normalizer_notes(described: Mapping[str, Any]) -> list[str]:
    """Notes on changes of a text before it is tokenized; raises FormatError for those that llama.cpp does not make."""
    notes = []
    for step in _steps(described.get("normalizer"), "normalizers"):
        marks_spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        if step["type"] == "NFC":
            notes.append(
                "the tokenizer of the model composes letters and accents of a text (Unicode NFC), llama.cpp does not: "
                "a text with separate accents may be tokenized differently"
            )
        elif not (marks_spaces or (step["type"] == "Prepend" and step["prepend"] == SPACE)):
            raise _unknown(f"it changes texts by {json.dumps(step, ensure_ascii=False)[:200]}")
    return notes


def _added_notes(described: Mapping[str, Any]) -> list[str]:
    added = described.get("added_tokens") or ()
    stripping = [one["content"] for one in added if any(one.get(flag) for flag in ("lstrip", "rstrip", "single_word"))]
    if not stripping:
        return []
    return [
        f"the tokenizer of the model matches {len(stripping)} added tokens together with spaces around them, or only "
        f"as separate words; llama.cpp does not: {stripping[:5]}"
    ]


def _merges(described: Mapping[str, Any]) -> list[str]:
    """The merges of byte-level BPE, each as two tokens with a space between them."""
    stored = described["model"].get("merges") or ()
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stored]
    return [" ".join(part.replace(" ", BYTE_SPACE) for part in pair) for pair in pairs]


def _sentence_piece(described: Mapping[str, Any], rows: int, notes: Sequence[str]) -> Vocabulary:
    import gguf

    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" and not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise _unknown(f"it splits texts by {json.dumps(step, ensure_ascii=False)[:200]}")
    tokens, types, left = _tokens(described, rows)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(described["model"].get("merges") or ()):
        first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(first + second, rank)
    added = {gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED}
    scores = tuple(
        ADDED if kind in added else float(-ranks[token]) if token in ranks else UNMERGED
        for token, kind in zip(tokens, types, strict=True)
    )
    return Vocabulary("llama", "default", tokens, types, scores, _prepends_space(described), (*notes, *left))


def _tokens(described: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    """Tokens and types of the ids 0 to `rows` - 1, and notes; llama.cpp needs one token per row of the embedding."""
    import gguf

    model = described["model"]
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    outside = []
    for token, index in model["vocab"].items():
        if index >= rows:
            outside.append(token)
            continue
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = int(gguf.TokenType.BYTE)
    for entry in described.get("added_tokens") or ():
        index, token = entry["id"], entry["content"]
        if index >= rows:
            outside.append(token)
        elif entry.get("special"):
            unknown = token == model.get("unk_token")
            tokens[index], types[index] = token, int(gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL)
        else:  # matched in the text before any change, including spaces
            tokens[index], types[index] = token.replace(SPACE, " "), int(gguf.TokenType.USER_DEFINED)
    notes = () if not outside else (f"{len(outside)} tokens are left out, they have no embedding: {outside[:5]}",)
    return tuple(tokens), tuple(types), notes


def _splits(pre: Mapping[str, Any] | None) -> list[str]:
    """The regular expressions that split a text, in their order; any other rule is given as JSON."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [expression for part in pre["pretokenizers"] for expression in _splits(part)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [_GPT2] if pre.get("use_regex", True) else []
    if kind == "Digits":
        return ["\\p{N}" if pre.get("individual_digits") else "\\p{N}+"]
    if kind == "Split" and "Regex" in pre["pattern"] and pre["behavior"] in {"Isolated", "Removed"}:
        if (pre["behavior"] == "Removed") == bool(pre.get("invert")):  # it removes what is between the words
            return [str(pre["pattern"]["Regex"])]
    return [json.dumps(pre)]


def _has_spaces_replaced(described: Mapping[str, Any]) -> bool:
    return any(SPACE in json.dumps(described.get(part), ensure_ascii=False) for part in ("normalizer", "pre_tokenizer"))


def _prepends_space(described: Mapping[str, Any]) -> bool:
    steps = [
        *_steps(described.get("normalizer"), "normalizers"),
        *_steps(described.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _steps(part: Mapping[str, Any] | None, members: str) -> Sequence[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of several."""
    if part is None:
        return ()
    steps: Sequence[Mapping[str, Any]] = part.get(members, [part])
    return steps


def _description(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as transformers uses it, in the form of a tokenizer.json.

    The file in the folder may lack tokens that other files add, or rules that the class of the tokenizer has.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise _unknown(f"it is Python code ({type(tokenizer).__name__}), expected a tokenizer.json")
    return dict(json.loads(backend.to_str()))


def _unknown(why: str) -> FormatError:
    return FormatError(
        f"llama.cpp has no tokenizer equivalent to that of the model: {why}",
        hint=REMEDY,
    )
