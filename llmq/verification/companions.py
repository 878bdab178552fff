"""Check the files next to the weights: a damaged tokenizer or chat template changes what a model writes, silently."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError
from llmq.runtime.load import generation_settings, has_tokenizer, load_tokenizer

GENERATION = "generation_config.json"
OBJECTS = {  # other files, such as modules.json of sentence-transformers, may be lists
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
}  # fmt: skip
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks what the assistant wrote, for training


def problems(folder: Path, *, remote_code: bool) -> Iterator[str]:
    """What is wrong with the tokenizer, the settings of generation and the chat templates of a model."""
    for file in sorted(folder.glob("*.json")):
        try:
            _require_json(file)
        except CheckpointError as error:
            yield str(error)
    template: object = None
    try:
        if (folder / GENERATION).is_file():
            generation_settings(folder)
        if has_tokenizer(folder):
            template = load_tokenizer(folder, remote_code=remote_code).chat_template
    except CheckpointError as error:
        yield str(error)
    texts = {f"{folder / file.name}": _text(file) for pattern in TEMPLATES for file in sorted(folder.glob(pattern))}
    named = template if isinstance(template, dict) else {"default": template} if isinstance(template, str) else {}
    texts |= {f"the chat template {name!r} of the tokenizer": text for name, text in named.items()}
    for name, text in texts.items():
        if (why := _syntax_error(text)) is not None:
            yield f"{name} is not a valid template: {why}"


def notes(folder: Path) -> list[str]:
    """What a model may lack, because it runs without."""
    return [] if has_tokenizer(folder) else [f"{folder} has no tokenizer"]


def _require_json(file: Path) -> None:
    """Raise CheckpointError unless a file is valid JSON, or an object where transformers expects one."""
    if file.name in OBJECTS:
        read_json_object(file)
        return
    with reading(file):
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is not valid JSON: {error}", hint="download or copy the file again"
            ) from None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _syntax_error(text: str) -> str | None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", text))
    except (TemplateSyntaxError, RecursionError) as error:
        return str(error)
    return None
