"""Special tokens and chat template of a model, as keys of a GGUF file.

What the tokenizer of transformers does counts, not the files that it was read from: several of them may hold the same
setting, and transformers knows which one applies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint.index import read_json_object
from llmq.errors import FormatError

REMEDY = "use a safetensors format, which keeps the tokenizer unchanged"
GENERATION = "generation_config.json"
ENDS = ("eos", "eot", "eom")
"""llama.cpp stops at the tokens of these three keys: the end of a text, of a turn and of a message."""
OTHERS = ("unk", "sep", "pad", "cls", "mask")


def add_special_tokens(writer: Any, tokenizer: Any, folder: Path, config: Mapping[str, Any], rows: int) -> list[str]:
    """Write the ids of special tokens below `rows`, which of them are added to a text, and the chat template.

    Returns notes for the user.
    """
    ends = end_tokens(tokenizer, folder, config)
    first = tokenizer.bos_token_id
    ids: dict[str, Any] = {
        "bos": config.get("bos_token_id") if first is None else first,
        **dict(zip(ENDS, ends, strict=False)),
        **{kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in OTHERS},
    }
    for kind, number in ids.items():
        if isinstance(number, int) and 0 <= number < rows:
            getattr(writer, f"add_{kind}_token_id")(number)
    starts, stops = _added_to_text(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(stops)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)
    if left := ends[len(ENDS) :]:
        return [f"a GGUF file holds {len(ENDS)} tokens that end a text: llama.cpp does not stop at {left}"]
    return []


def end_tokens(tokenizer: Any, folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The ids at which transformers stops: of the tokenizer, then of the generation settings or the configuration."""
    file = folder / GENERATION
    stops = read_json_object(file) if file.is_file() else config
    declared = [tokenizer.eos_token_id, stops.get("eos_token_id")]
    flat = [number for value in declared for number in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(number for number in flat if isinstance(number, int)))


def _added_to_text(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer adds its first token to the beginning of a text, and its last token to the end.

    Raises FormatError if it adds others.
    """
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for starts in (False, True):
        for stops in (False, True):
            if ids == first * starts + bare + last * stops:
                return starts, stops
    raise FormatError(
        f"the tokenizer turns a text of the tokens {bare} into {ids}, and llama.cpp can add only {first} before and "
        f"{last} after it",
        hint=REMEDY,
    )
