"""`Checkpoint`: a model folder, of which nothing but headers is read until a tensor is asked for."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.index import Location, locate_tensors, read_json_object, refuse_gguf
from llmq.checkpoint.safetensors_files import TensorInfo, read_header_bytes, read_tensor, reading
from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model on disk.

    folder  where it lies
    config  the object in config.json
    files   the safetensors files that hold its tensors

    Every method that reads raises CheckpointError if a file has gone, was cut short or cannot be read.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    _tensors: dict[str, Location] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config.json and the headers of the weights; raises CheckpointError for whatever is not right there."""
        with reading(folder):
            if not folder.exists():
                message, hint = f"{folder} does not exist", "give the folder that holds the model's config.json"
                raise CheckpointError(message, hint=hint)
            if not folder.is_dir():
                refuse_gguf(folder)
                message, hint = f"{folder} is a file, expected a model's folder", _hint_of_file(folder)
                raise CheckpointError(message, hint=hint)
            if not (folder / CONFIG).exists():
                raise _no_config(folder)
        config = read_json_object(folder / CONFIG)
        tensors = locate_tensors(folder)
        files = tuple(dict.fromkeys(location.file for location in tensors.values()))
        return cls(folder, config, files, tensors)

    def names(self) -> list[str]:
        """Every tensor, file by file, in the order in which they lie."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def location(self, name: str) -> Location:
        """In which file a tensor lies, and where in it."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self.location(name).info

    def tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU, in memory of its own."""
        location = self.location(name)
        return read_tensor(location.file, location.info)

    def member(self, name: str, index: int) -> Tensor:
        """One of the tensors that are stacked in another, along its first dimension; no more than that is read."""
        file, info = self.location(name).file, self.info(name)
        size = info.nbytes // info.shape[0]
        start = info.start + index * size
        return read_tensor(file, dataclasses.replace(info, shape=info.shape[1:], start=start, stop=start + size))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(location.info.nbytes for location in self._tensors.values())

    def modules_with(self, suffix: str) -> list[str]:
        """The modules that hold a tensor of this name: "qweight" -> ["model.layers.0.mlp.down_proj", …]."""
        ending = "." + suffix.removeprefix(".")
        return [name.removesuffix(ending) for name in self._tensors if name.endswith(ending)]

    def fingerprint(self) -> str:
        """SHA-256 over config.json and each file's name, size, header and time of change.

        Equal fingerprints mean the same unchanged files; the weights themselves are not read, which would take minutes.
        """
        digest = hashlib.sha256()
        with reading(self.folder):
            _add(digest, (self.folder / CONFIG).read_bytes())
            for file in self.files:
                header, size = read_header_bytes(file)
                name = file.relative_to(self.folder).as_posix()
                _add(digest, json.dumps([name, size, file.stat().st_mtime_ns]).encode())
                _add(digest, header)
        return digest.hexdigest()


def _add(digest: "hashlib._Hash", data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))  # so that no two sequences of pieces read the same
    digest.update(data)


def _hint_of_file(file: Path) -> str:
    there = (file.parent / CONFIG).is_file()
    return f"give its folder, {file.parent}" if there else "give the folder that holds the model's config.json"


def _no_config(folder: Path) -> CheckpointError:
    refuse_gguf(folder)
    if (folder / STAGING).exists():
        message = f"{folder} holds an unfinished run of llmq, not yet a model"
        return CheckpointError(message, hint="give the command that started it again, and it continues")
    return CheckpointError(f"{folder} has no {CONFIG}", hint="give the folder that holds the model's config.json")
