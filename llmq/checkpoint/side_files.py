"""The files next to the weights that belong to the model: tokenizer, chat templates, generation settings, licence.

A result gets these files, unchanged. It does not get what belongs to something else: weights in other layouts, the
state of a training, an adapter that is merged or not, and the card of the original, which describes another model and
is kept under another name.

A link may point anywhere, and results are uploaded. So a link is followed only if its target is in the model folder, or
in the cache of the Hub, which stores the files of a snapshot as links into a folder next to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmq.checkpoint import PAGE_FILES, PROVENANCE_FILE
from llmq.checkpoint.index import ADAPTER, ADAPTER_WEIGHTS
from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError

WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".pkl",
    ".pickle",
    ".npz",
}
CONFIGURATIONS = {"config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"}
REWRITTEN = {*CONFIGURATIONS, PROVENANCE_FILE, *PAGE_FILES}
ADAPTER_FILES = {ADAPTER, f"{ADAPTER_WEIGHTS}.json"}
TRAINING = {  # written by the trainers of transformers and TRL
    "trainer_state.json",
    "trainer_log.jsonl",
    "training_args.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}
CARD, ORIGINAL_CARD = "README.md", "README.original.md"
TEXT_SUFFIXES = {".jinja", ".json", ".txt", ".model", ".py"}  # of files in folders
OTHER_MODEL = {"config.json", "params.json", *ADAPTER_FILES, *TRAINING}  # a folder with one of these has another model


@dataclass(frozen=True)
class Companions:
    """files: the name in the result -> the file; notes: for the user."""

    files: dict[str, Path]
    notes: tuple[str, ...]


def companions(folder: Path) -> Companions:
    """The files of a model folder that are copied unchanged; raises CheckpointError if it cannot be read."""
    with reading(folder):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        chosen = [entry for entry in entries if entry.is_file() and _belongs(entry)]
        for inner in (entry for entry in entries if entry.is_dir() and not leaves(folder, entry)):
            chosen += _of_folder(inner)
        outside = [file for file in chosen if leaves(folder, file)]
    files = {file.relative_to(folder).as_posix(): file for file in chosen if file not in outside}
    card = files.pop(CARD, None)
    if card is not None and not (folder / PROVENANCE_FILE).is_file():  # a result of llmq has llmq's card
        files.setdefault(ORIGINAL_CARD, card)
    return Companions(files, tuple(_notes(folder, entries, outside)))


def leaves(folder: Path, file: Path) -> bool:
    """Whether a file of a model folder is in another place, because of a link."""
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(file.resolve().is_relative_to(place) for place in allowed)


def refuse_outside(folder: Path, names: tuple[str, ...]) -> None:
    """Raise CheckpointError for files whose contents would be written, if they are links that leave the folder."""
    for file in (folder / name for name in names):
        if file.exists() and leaves(folder, file):
            raise CheckpointError(
                f"{file} is a link that leaves the model folder, expected a file in it",
                hint="replace the link by the file, if you trust the model",
            )


def _belongs(file: Path) -> bool:
    named = file.name in REWRITTEN | ADAPTER_FILES | TRAINING
    return not (named or file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json"))


def _of_folder(folder: Path) -> Iterator[Path]:
    """The text files of a folder such as `additional_chat_templates`; none of a folder with another model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not any(file.name in OTHER_MODEL or file.suffix in WEIGHT_SUFFIXES for file in files):
        inner = (file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
        yield from (file for file in inner if file.suffix in TEXT_SUFFIXES)


def _notes(folder: Path, entries: list[Path], outside: list[Path]) -> Iterator[str]:
    if any(entry.name == ADAPTER for entry in entries):
        yield (
            f"{ADAPTER} is not used: the weights are taken to contain the adapter already; if they do not, merge the "
            "adapter first"
        )
    for file in outside:
        yield f"{file.relative_to(folder).as_posix()} is a link that leaves the model folder; it is not copied"
