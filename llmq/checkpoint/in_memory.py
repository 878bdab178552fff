"""A model in memory as a checkpoint: saved by transformers into a temporary folder, and read like any other.

A run then does the same for both, and never changes the model of the caller. It takes disk space for one copy, in the
folder of the output.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from llmq.checkpoint.atomic import storing
from llmq.errors import ConfigError


class Savable(Protocol):
    """A model of transformers."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


@contextmanager
def opened(model: str | Path | Savable, tokenizer: Any, out: str | Path | None) -> Iterator[tuple[str | Path, str]]:
    """A model as a folder or Hub id, and its name; a model in memory is saved next to `out`, and deleted at the end.

    Raises ConfigError for anything but a path, an id, or a float model of transformers with its tokenizer.
    """
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError("tokenizer is for a model in memory", hint="omit it: the folder has its own")
        yield model, str(model)
        return
    _require_float_model(model)
    if not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}, expected the tokenizer of the model in memory",
            hint="give tokenizer=AutoTokenizer.from_pretrained(…)",
        )
    if out is None:
        raise ConfigError("a model in memory needs an output folder", hint="for example llmq.quantize(model, 'out')")
    parent = Path(out).absolute().parent
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".llmq-model-", dir=parent)
    with folder as name:
        with storing(parent):
            model.save_pretrained(name)
            tokenizer.save_pretrained(name)
            date_by_contents(Path(name))
        yield Path(name), _name_of(model)


def _name_of(model: Savable) -> str:
    """The id or folder that the model was loaded from, or the name of its class."""
    name = getattr(model, "name_or_path", "")
    return name if isinstance(name, str) and name else f"{type(model).__name__} in memory"


def _require_float_model(model: Savable) -> None:
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ConfigError(f"{kind} is a model with an adapter", hint="merge it first: model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model is a {kind}, expected a folder, a Hub id or a model of transformers",
            hint="for example llmq.quantize('Qwen/Qwen3-0.6B', 'out')",
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(f"{kind} is quantized already", hint="load the float model, without quantization_config")


def date_by_contents(folder: Path) -> None:
    """Set the modification time of the weights to a digest of their contents.

    A run recognizes its model by names, sizes and modification times (`Checkpoint.fingerprint`). So a repeated call
    with the same weights continues, and one with other weights does not.
    """
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
        moment = int.from_bytes(digest[:7], "big")  # nanoseconds: a time in the first years after 1970
        os.utime(file, ns=(moment, moment))
