"""`Checkpoint`: a model folder. Opening it reads only headers; tensors are read on request."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.index import Location, locate_tensors, read_json_object, refuse_adapter, refuse_gguf
from llmq.checkpoint.model_path import require_model
from llmq.checkpoint.output_folder import CONFIG
from llmq.checkpoint.safetensors_files import TensorInfo, read_header_bytes, read_tensor, reading
from llmq.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model on disk.

    folder  the model folder
    config  the object in config.json
    files   the safetensors files with its tensors

    Every method that reads raises CheckpointError if a file is missing, truncated or cannot be read.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    _tensors: dict[str, Location] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config.json and the headers of the weights; raises CheckpointError if one is missing or invalid."""
        with reading(folder):
            if not folder.exists():
                message, hint = f"{folder} does not exist", "give the folder that holds the model's config.json"
                raise CheckpointError(message, hint=hint)
            if not folder.is_dir():
                refuse_gguf(folder)
                message, hint = f"{folder} is a file, expected the folder of a model", _hint_for_file(folder)
                raise CheckpointError(message, hint=hint)
            if not (folder / CONFIG).exists():
                raise _no_config(folder)
        config = read_json_object(folder / CONFIG)
        tensors = locate_tensors(folder)
        files = tuple(dict.fromkeys(location.file for location in tensors.values()))
        return cls(folder, config, files, tensors)

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def location(self, name: str) -> Location:
        """The file of a tensor, and its place in that file."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self.location(name).info

    def tensor(self, name: str) -> Tensor:
        """Read a tensor; on the CPU, in newly allocated memory."""
        location = self.location(name)
        return read_tensor(location.file, location.info)

    def member(self, name: str, index: int) -> Tensor:
        """Read one slice of a stacked tensor, along its first dimension, and nothing else."""
        return self.rows(name, index, index + 1)[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the slices `start` to `stop` of a tensor, along its first dimension, and nothing else."""
        file, info = self.location(name).file, self.info(name)
        size = info.nbytes // info.shape[0]
        first, last = info.start + start * size, info.start + stop * size
        part = dataclasses.replace(info, shape=(stop - start, *info.shape[1:]), start=first, stop=last)
        return read_tensor(file, part)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(location.info.nbytes for location in self._tensors.values())

    def modules_with(self, suffix: str) -> list[str]:
        """The modules with a tensor of this name: "qweight" -> ["model.layers.0.mlp.down_proj", …]."""
        ending = "." + suffix.removeprefix(".")
        return [name.removesuffix(ending) for name in self._tensors if name.endswith(ending)]

    def fingerprint(self) -> str:
        """SHA-256 over config.json and the name, size, header and modification time of each file.

        Equal fingerprints mean the same unchanged files. The weights are not read, because that would take minutes.
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
    digest.update(len(data).to_bytes(8, "little"))  # so that different sequences of pieces never give the same bytes
    digest.update(data)


def _hint_for_file(file: Path) -> str:
    has_config = (file.parent / CONFIG).is_file()
    return f"give its folder, {file.parent}" if has_config else "give the folder that holds the model's config.json"


def _no_config(folder: Path) -> CheckpointError:
    require_model(folder)
    refuse_gguf(folder)
    refuse_adapter(folder)
    return CheckpointError(f"{folder} has no {CONFIG}", hint="give the folder that holds the model's config.json")
