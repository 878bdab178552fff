"""Which file of a model folder holds which tensor.

Looked for in the order of transformers: `model.safetensors`; `model.safetensors.index.json`, which says in which shard
each tensor lies; else every other `*.safetensors`, as long as they share no name.  Pickled weights are refused:
unpickling a file runs the code in it.

An index is text from elsewhere, so a path in it that leaves the folder is refused.  The path is judged as text:
the cache of the Hub keeps the files of a snapshot as symbolic links into a folder beside it, and those must work.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llmq.checkpoint.safetensors_files import COPY_AGAIN, TensorInfo, read_header, reading
from llmq.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GGUF = ".gguf"
GGUF_HINT = "llama.cpp runs it; `llmq eval` measures it, and `llmq convert` makes a format of it that llmq loads"
PICKLES = (".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Location:
    """A tensor in a file of the checkpoint."""

    file: Path
    info: TensorInfo


def locate_tensors(folder: Path) -> dict[str, Location]:
    """Every tensor of the checkpoint, file by file, in the order in which they lie.

    Raises CheckpointError if there are no safetensors, a file is missing or damaged, or index and shards disagree.
    """
    with reading(folder):
        return _locate(folder)


def gguf_file(path: Path) -> Path | None:
    """The .gguf file that a path means: itself, or the only one in a folder that has no other weights."""
    if path.suffix == GGUF and not path.is_dir():
        return path
    with reading(path):
        if not path.is_dir() or any(path.glob("*.safetensors")) or any(e.suffix in PICKLES for e in path.iterdir()):
            return None
        found = list(path.glob(f"*{GGUF}"))
    return found[0] if len(found) == 1 else None


def refuse_gguf(path: Path) -> None:
    """Raise CheckpointError for a .gguf file, or a folder that holds nothing else, where safetensors are wanted."""
    file = gguf_file(path)
    if file is not None and file.is_file():
        raise CheckpointError(f"{file} is a .gguf file, which llmq does not run itself", hint=GGUF_HINT)


def _locate(folder: Path) -> dict[str, Location]:
    if (folder / SINGLE).exists():
        return {name: Location(folder / SINGLE, info) for name, info in read_header(folder / SINGLE).items()}
    if (folder / INDEX).exists():
        return _by_index(folder, _read_index(folder / INDEX))
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [entry for entry in entries if entry.suffix == ".safetensors"]
    if not files:
        raise _no_weights(folder, [entry.name for entry in entries if entry.suffix in PICKLES])
    _refuse_missing_shards(folder, {file.name for file in files})
    return _union(files)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises CheckpointError if it cannot be read, is not JSON, or is something else."""
    with reading(path):
        data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=COPY_AGAIN) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, expected an object", hint=COPY_AGAIN)
    return document


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        message = f"{path} has no weight_map that says in which file each tensor lies"
        raise CheckpointError(message, hint=COPY_AGAIN)
    return weight_map


def _by_index(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Location]:
    tensors: dict[str, Location] = {}
    wanted: dict[str, set[str]] = {}  # file -> tensors
    for name, file_name in weight_map.items():
        wanted.setdefault(file_name, set()).add(name)
    for file_name, names in sorted(wanted.items()):
        file = _inside(folder, file_name)
        if not file.is_file():
            message = f"{folder / INDEX} names {file_name}, which is not in the folder"
            raise CheckpointError(message, hint="download or copy the missing file")
        header = read_header(file)
        absent = sorted(names - header.keys())
        if absent:
            message = f"{folder / INDEX} says that {file_name} holds {absent[0]}, which it does not"
            raise CheckpointError(message, hint="the index and the shards belong to different versions: " + COPY_AGAIN)
        tensors.update({name: Location(file, info) for name, info in header.items() if name in names})
    return tensors


def _inside(folder: Path, file_name: str) -> Path:
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    leaves = posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts)
    if leaves or "\0" in file_name or posix.suffix != ".safetensors":
        message = f"{folder / INDEX} names {file_name!r}, expected a safetensors file inside of the folder"
        raise CheckpointError(message, hint="do not trust this checkpoint; get it from its source again")
    return folder / file_name


def _union(files: list[Path]) -> dict[str, Location]:
    tensors: dict[str, Location] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                message = f"tensor {name} is in {tensors[name].file} and in {file.name}, and there is no {INDEX}"
                raise CheckpointError(message, hint="keep only the files of one model in the folder, or add its index")
            tensors[name] = Location(file, info)
    return tensors


def _refuse_missing_shards(folder: Path, names: set[str]) -> None:
    for shard in filter(None, map(_SHARD.fullmatch, sorted(names))):
        count = int(shard["count"])
        expected = [f"{shard['stem']}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        missing = [name for name in expected if name not in names]
        if missing:
            message = f"{folder} has {shard[0]} but not {missing[0]}: {len(missing)} of {count} shards are missing"
            raise CheckpointError(message, hint="download or copy the missing files")


def _no_weights(folder: Path, pickles: list[str]) -> CheckpointError:
    refuse_gguf(folder)
    if not pickles:
        hint = "download or copy the weights into it"
        return CheckpointError(f"{folder} holds no weights: no *.safetensors is in it", hint=hint)
    message = f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), and opening those can run code"
    hint = "use a revision with safetensors, or convert: model.save_pretrained(folder, safe_serialization=True)"
    return CheckpointError(message, hint=hint)
