"""What a card takes over from the original: its name on the Hub, licence, languages and purpose.

All of it was written by strangers, so only short texts of the expected kind are taken over.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.checkpoint.safetensors_files import reading
from llmq.checkpoint.side_files import CARD, ORIGINAL_CARD, leaves
from llmq.report.escaped import printable

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
CACHED = re.compile(r"models--(.+)")  # the folder of a model in the cache of the Hub
LICENCE = re.compile(r"(licen[cs]e|copying)(\..*)?", re.IGNORECASE)
QUANTIZED, FINETUNE = "quantized", "finetune"
RELATIONS = {QUANTIZED, FINETUNE, "adapter", "merge"}
LARGEST = 1 << 20  # bytes of a card that is read
LONGEST, MOST = 200, 100  # characters of a value, and values of a list

NO_ORIGINAL = (
    "README.md names no base_model: the model is a local folder. If the original is on the Hub, add its id before you "
    "publish the result"
)
DECLARED = "README.md names {} as base_model, from {} of the local model: check it before you publish the result"
NO_LICENCE = "README.md names no licence: the original has neither a licence in its card nor a LICENSE file"


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    models    ids on the Hub; usually one, several for a merge, none if that is not known
    relation  of the result to them, as `base_model_relation` of the Hub
    card      the metadata that the card of the original has
    notes     for the user
    """

    models: tuple[str, ...]
    relation: str
    card: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def origin_of(folder: Path, config: Mapping[str, Any]) -> Origin:
    """The origin of a result that is made from the model in `folder`, whose config.json holds `config`."""
    card, notes = read_card(folder)
    declared = tuple(name for name in texts(card.get("base_model")) if HUB_ID.fullmatch(name))
    cached = _cached_id(folder)
    if declared and "quantization_config" in config:
        return Origin(declared, QUANTIZED, card, notes)
    if cached is not None:
        return Origin((cached,), QUANTIZED, card, notes)
    if declared:
        relation = card.get("base_model_relation")
        known = relation if isinstance(relation, str) and relation in RELATIONS else FINETUNE
        return Origin(declared, known, card, (*notes, DECLARED.format(declared[0], "the card")))
    name = config.get("_name_or_path")
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return Origin((name,), QUANTIZED, card, (*notes, DECLARED.format(name, "_name_or_path in config.json")))
    return Origin((), "", card, (*notes, NO_ORIGINAL))


def read_card(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The metadata at the top of the card of a model, and notes for the user; empty without a card."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    file = next((folder / name for name in (CARD, ORIGINAL_CARD) if (folder / name).is_file()), None)
    if file is None or leaves(folder, file):
        return {}, ()
    try:
        with reading(file):
            if file.stat().st_size > LARGEST:
                return {}, (f"{file} is not used for README.md: it is larger than {LARGEST} bytes",)
            return metadata_load(file) or {}, ()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return {}, (f"{file} is not used for README.md: its metadata cannot be read: {reason}",)


def licence(origin: Origin, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`license`, `license_name` and `license_link` for the card of the result in `folder`, and notes for the user."""
    names, link = texts(origin.card.get("license")), texts(origin.card.get("license_link"))
    files = sorted(file.name for file in folder.iterdir() if file.is_file() and LICENCE.fullmatch(file.name))
    if not names:
        if not files:
            return {}, (NO_LICENCE,)
        return {"license": "other", "license_link": files[0]}, ()
    entries: dict[str, Any] = {"license": names[0] if len(names) == 1 else names}
    if title := texts(origin.card.get("license_name")):
        entries["license_name"] = title[0]
    if target := _link(link[0], folder, origin.models) if link else None:
        entries["license_link"] = target
    return entries, ()


def _link(link: str, folder: Path, models: tuple[str, ...]) -> str | None:
    """The link to a licence: an address, a file of the result, or a file of the original; None for anything else."""
    if re.fullmatch(r"https?://[^\s<>\"'`()]+", link):
        return link
    if not re.fullmatch(r"[\w.-]+", link, re.ASCII):
        return None
    if (folder / link).is_file():
        return link
    return f"https://huggingface.co/{models[0]}/blob/main/{link}" if models else None


def texts(value: object) -> list[str]:
    """The texts of an entry, which is one or a list; without long ones, and those with control characters."""
    values: Iterable[object] = value[:MOST] if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and _is_plain(text)]


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= LONGEST and text == printable(text) and "\n" not in text


def _cached_id(folder: Path) -> str | None:
    """The id of a model in the cache of the Hub: `…/models--owner--name/snapshots/COMMIT`."""
    place = folder.absolute()
    match = CACHED.fullmatch(place.parent.parent.name) if place.parent.name == "snapshots" else None
    return match[1].replace("--", "/") if match else None
