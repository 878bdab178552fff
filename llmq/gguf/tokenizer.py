"""The vocabulary of a model, as llama.cpp reads it.

llama.cpp has tokenizers of its own.  Two of them serve here: "gpt2", byte-level BPE with merges, and "llama", where the
pair with the highest score is joined first (SentencePiece's BPE).  tokenizer.json says which of them a model has.

How byte-level BPE cuts a text into words before merging is a regular expression in tokenizer.json, and a *name* in
GGUF (`tokenizer.ggml.pre`), behind which llama.cpp has the expression.  Its own converter recognizes names by a hash of
what a tokenizer makes of a test text, so it knows only vocabularies that somebody has listed.  Here the expressions
themselves are compared: an expression that llama.cpp has is enough, whatever the vocabulary.

A "llama" tokenizer without its SentencePiece file has no scores, but merges in the order of their priority; minus the
rank of the first merge that makes a token orders them in the same way.
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
NEVER = "[NEVER]"  # a part of no text, as merging starts from single characters
UNMERGED, ADDED = -10000.0, -1000.0  # scores of what no merge makes

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
"""What cuts a text, one after the other -> llama.cpp's name for it."""

WITHOUT_MERGING = frozenset({"llama-bpe", "tekken"})
"""Where llama.cpp takes a word that is in the vocabulary as it is, without asking the merges (`ignore_merges`)."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how texts become them.

    model   GGUF's tokenizer: "gpt2" or "llama"
    pre     its way to cut a text into words
    types   `gguf.TokenType`
    scores  of "llama"; empty for "gpt2"
    space_prefix  whether a space is put in front of a text ("llama")
    notes   what differs from the tokenizer that the model came with
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    space_prefix: bool = False
    notes: tuple[str, ...] = ()


def add_tokenizer(writer: Any, folder: Path, rows: int) -> Vocabulary:
    """`tokenizer.*` for a model with so many rows in its embedding; returns what was written.

    Raises CheckpointError where there is no tokenizer, FormatError where llama.cpp has none that does the same.
    """
    import gguf

    tokenizer = load_tokenizer(folder, remote_code=False)
    found = read(_description(folder, tokenizer), rows)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types(list(found.types))
    if found.model == "llama":
        writer.add_token_scores(list(found.scores))
        writer.add_add_space_prefix(found.space_prefix)
    with _silent("gguf.vocab"):  # its remarks are guesses about what is asked of the tokenizer itself below
        special = gguf.SpecialVocab(folder, load_merges=found.model == "gpt2", n_vocab=rows)
    if found.model == "gpt2" and not special.merges:  # llama.cpp wants some; this one can never apply
        special.merges = [f"{NEVER} {NEVER}"]
    for kind in ("bos", "eos"):  # what the tokenizer does counts, and not what one of its files says about it
        special.add_special_token[kind] = _adds(tokenizer, kind)
        if (known := getattr(tokenizer, f"{kind}_token_id")) is not None:
            special.special_token_ids[kind] = known
    special.add_to_gguf(writer, quiet=True)
    return found


def read(described: Mapping[str, Any], rows: int) -> Vocabulary:
    """A tokenizer.json's content as GGUF's vocabulary of so many tokens; raises FormatError where there is none."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r}")
    if model.get("byte_fallback") or _has_spaces_replaced(described):
        return _sentence_piece(described, rows)
    pre = PRE.get(tuple(_splits(described.get("pre_tokenizer"))))
    if pre is None:
        shown = json.dumps(described.get("pre_tokenizer"), ensure_ascii=False)
        raise _unknown(f"it cuts texts by {shown}, and llama.cpp's ways are {', '.join(PRE.values())}")
    notes = []
    if bool(model.get("ignore_merges")) != (pre in WITHOUT_MERGING):
        notes.append(
            f"llama.cpp's tokenizer {pre!r} looks words up "
            f"{'before merging' if pre in WITHOUT_MERGING else 'only by merging'}, the model's does not: "
            "a few words may become other tokens"
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
    """Tokens and types of the ids 0 to `rows`; llama.cpp wants one for each row of the embedding."""
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
        else:  # looked for in the text as it is, spaces and all
            tokens[index], types[index] = token.replace(SPACE, " "), int(gguf.TokenType.USER_DEFINED)
    notes = () if not outside else (f"the model has no embedding for {len(outside)} tokens, left out: {outside[:5]}",)
    return tuple(tokens), tuple(types), notes


def _splits(pre: Mapping[str, Any] | None) -> list[str]:
    """The regular expressions that cut a text, in their order; what is none stands as its description."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [each for part in pre["pretokenizers"] for each in _splits(part)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [_GPT2] if pre.get("use_regex", True) else []
    if kind == "Digits":
        return ["\\p{N}" if pre.get("individual_digits") else "\\p{N}+"]
    if kind == "Split" and "Regex" in pre["pattern"] and pre["behavior"] in {"Isolated", "Removed"}:
        if (pre["behavior"] == "Removed") == bool(pre.get("invert")):  # "remove what is between the words"
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
    """Whether a text's ids begin (bos) or end (eos) with a special token that the text alone does not have."""
    wanted = getattr(tokenizer, f"{kind}_token_id")
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return wanted is not None and len(ids) > len(bare) and ids[0 if kind == "bos" else -1] == wanted


def _description(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The content of tokenizer.json, or what transformers makes of the files that are there in its place."""
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}", hint="copy it from the original model") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise _unknown(f"it is Python code ({type(tokenizer).__name__}) and no tokenizer.json")
    return dict(json.loads(backend.to_str()))


def _unknown(why: str) -> FormatError:
    return FormatError(
        f"llama.cpp has no tokenizer that does what the model's does: {why}",
        hint="the safetensors formats keep the tokenizer as it is",
    )
