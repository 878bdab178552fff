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
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmq.errors import CheckpointError, FormatError
from llmq.runtime.load import load_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space
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


def add_tokenizer(writer: Any, folder: Path, rows: int) -> Vocabulary:
    """Write `tokenizer.*` for a model with `rows` rows in its embedding; returns what was written.

    Raises CheckpointError where there is no tokenizer, FormatError where llama.cpp has no equivalent one.
    """
    import gguf

    tokenizer = load_tokenizer(folder, remote_code=False)
    vocabulary = read(_description(folder, tokenizer), rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "llama":
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    with _silent("gguf.vocab"):  # it logs guesses about settings that are read from the tokenizer itself below
        special = gguf.SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=rows)
    if vocabulary.model == "gpt2" and not special.merges:  # llama.cpp needs at least one; this one never applies
        special.merges = [f"{NEVER} {NEVER}"]
    for kind in ("bos", "eos"):  # the behaviour of the tokenizer decides, not the settings in its files
        special.add_special_token[kind] = _adds(tokenizer, kind)
        if (known := getattr(tokenizer, f"{kind}_token_id")) is not None:
            special.special_token_ids[kind] = known
    special.add_to_gguf(writer, quiet=True)
    return vocabulary


def read(described: Mapping[str, Any], rows: int) -> Vocabulary:
    """The content of a tokenizer.json as a vocabulary of `rows` tokens; raises FormatError where GGUF has none."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r}")
    if model.get("byte_fallback") or _has_spaces_replaced(described):
        return _sentence_piece(described, rows)
    pre = PRE.get(tuple(_splits(described.get("pre_tokenizer"))))
    if pre is None:
        shown = json.dumps(described.get("pre_tokenizer"), ensure_ascii=False)
        raise _unknown(f"it splits texts by {shown}, expected one of {', '.join(PRE.values())}")
    notes = []
    if bool(model.get("ignore_merges")) != (pre in WITHOUT_MERGING):
        notes.append(
            f"llama.cpp's tokenizer {pre!r} looks words up "
            f"{'before merging' if pre in WITHOUT_MERGING else 'only by merging'}, the tokenizer of the model does "
            "not: a few words may be tokenized differently"
        )
    tokens, types, left = _tokens(described, rows)
    return Vocabulary("gpt2", pre, tokens, types, notes=(*notes, *left))


def _sentence_piece(described: Mapping[str, Any], rows: int) -> Vocabulary:
    import gguf

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
    return Vocabulary("llama", "default", tokens, types, scores, _prepends_space(described), left)


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
    normalizer, pre = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps: Sequence[Mapping[str, Any]] = [
        *normalizer.get("normalizers", [normalizer]),
        *pre.get("pretokenizers", [pre]),
    ]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _adds(tokenizer: Any, kind: str) -> bool:
    """Whether the tokenizer adds the special token at the beginning (bos) or the end (eos) of a text."""
    wanted = getattr(tokenizer, f"{kind}_token_id")
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return wanted is not None and len(ids) > len(bare) and ids[0 if kind == "bos" else -1] == wanted


def _description(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The content of tokenizer.json, or of an equivalent one that transformers builds from other files."""
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}", hint="copy it from the original model") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise _unknown(f"it is Python code ({type(tokenizer).__name__}), expected a tokenizer.json")
    return dict(json.loads(backend.to_str()))


def _unknown(why: str) -> FormatError:
    return FormatError(
        f"llama.cpp has no tokenizer equivalent to that of the model: {why}",
        hint="use a safetensors format, which keeps the tokenizer unchanged",
    )
