"""Which file of a model folder holds which tensor.

Files are looked up in the order of transformers: `model.safetensors`; then `model.safetensors.index.json`, which maps
tensors to shards; then all other `*.safetensors`, if no tensor name occurs twice. Pickled weights are refused, because
unpickling a file runs the code in it.

The index may come from an untrusted source, so a path that leaves the folder is refused. Paths are compared as text,
because the cache of the Hub stores the files of a snapshot as symbolic links into another folder.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint.confined import confined
from llmq.checkpoint.safetensors_files import COPY_AGAIN, TensorInfo, read_header, reading
from llmq.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model"
GGUF = ".gguf"
ONNX_FILE = "model.onnx"  # of a folder that `llmq convert --to onnx` writes
GGUF_HINT = "run it with llama.cpp, measure it with `llmq eval`, or convert it with `llmq convert`"
PICKLES = (".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")

WRAPPERS = {  # part of a tensor's name -> what puts it there, and the way out
    "base_model.model.": ("an adapter of PEFT", "merge the adapter first, with merge_and_unload()"),
    ".lora_A.": ("an adapter of PEFT", "merge the adapter first, with merge_and_unload()"),
    ".base_layer.": ("an adapter of PEFT", "merge the adapter first, with merge_and_unload()"),
    "_orig_mod.": ("torch.compile", "save the model before it is compiled, or save model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "save the full state of the model, without the wrapper"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "save the model without the wrapper"),
}

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Location:
    """A tensor in a file of the checkpoint."""

    file: Path
    info: TensorInfo


def locate_tensors(folder: Path) -> dict[str, Location]:
    """Return the location of every tensor, in the order of the files.

    Raises CheckpointError if there are no safetensors files, a file is missing or damaged, or the index does not match;
    and for tensors that have the names of a wrapped model, or of an adapter.
    """
    with reading(folder):
        tensors = _locate(folder)
    _refuse_wrapped(folder, tensors)
    return tensors


def gguf_file(path: Path) -> Path | None:
    """Return the .gguf file at `path`: the file itself, or the only .gguf file in a folder without other weights."""
    if path.suffix == GGUF and not path.is_dir():
        return path
    with reading(path):
        if not path.is_dir() or any(path.glob("*.safetensors")) or any(e.suffix in PICKLES for e in path.iterdir()):
            return None
        files = list(path.glob(f"*{GGUF}"))
    return files[0] if len(files) == 1 else None


def is_onnx(path: Path) -> bool:
    """Whether a path is a folder with an ONNX graph and no safetensors files."""
    return (path / ONNX_FILE).is_file() and not any(path.glob("*.safetensors"))


def refuse_gguf(path: Path) -> None:
    """Raise CheckpointError for a .gguf file, or a folder without other weights."""
    file = gguf_file(path)
    if file is not None and file.is_file():
        message = f"{file} is a .gguf file, which llmq does not run; expected safetensors files"
        raise CheckpointError(message, hint=GGUF_HINT)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter of PEFT, whose base model is elsewhere or not merged."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), expected a whole model",
            hint="llmq merge MODEL ADAPTER OUT merges it into its model and quantizes the result; "
            f"if its weights are already merged, remove {ADAPTER}",
        )


def _locate(folder: Path) -> dict[str, Location]:
    if (folder / SINGLE).exists():
        return {name: Location(folder / SINGLE, info) for name, info in read_header(folder / SINGLE).items()}
    if (folder / INDEX).exists():
        return _by_index(folder, _read_index(folder / INDEX))
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [entry for entry in entries if entry.suffix == ".safetensors" and entry.stem != ADAPTER_WEIGHTS]
    if not files:
        refuse_adapter(folder)
        raise _no_weights(folder, [entry.name for entry in entries if entry.suffix in PICKLES])
    _refuse_missing_shards(folder, {file.name for file in files})
    return _union(files)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises CheckpointError for anything else."""
    with reading(path):
        data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=COPY_AGAIN) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, expected an object", hint=COPY_AGAIN)
    return document


def _refuse_wrapped(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        wrapper = next((part for part in WRAPPERS if part in f".{name}"), None)
        if wrapper is not None:
            source, way_out = WRAPPERS[wrapper]
            raise CheckpointError(
                f"the tensor {name} in {folder} has a name from {source}, expected the names of the model", hint=way_out
            )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        message = f"{path} has no weight_map, expected one that maps tensors to files"
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
            message = f"{folder / INDEX} lists {absent[0]} in {file_name}, but that file does not contain it"
            raise CheckpointError(message, hint="the index and the shards belong to different versions: " + COPY_AGAIN)
        tensors.update({name: Location(file, info) for name, info in header.items() if name in names})
    return tensors


def _inside(folder: Path, file_name: str) -> Path:
    file = confined(folder, file_name)
    if file is None or file.suffix != ".safetensors":
        message = f"{folder / INDEX} names {file_name!r}, expected a safetensors file in the folder"
        raise CheckpointError(message, hint="do not trust this checkpoint; download it again")
    return file


def _union(files: list[Path]) -> dict[str, Location]:
    tensors: dict[str, Location] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                message = f"tensor {name} is in {tensors[name].file} and in {file.name}, and there is no {INDEX}"
                raise CheckpointError(message, hint="keep only the files of one model in the folder, or add the index")
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
    if (folder / ONNX_FILE).is_file():
        message = f"{folder} holds an ONNX model, which `llmq eval` and `llmq generate` run; expected safetensors files"
        return CheckpointError(message, hint="give the folder from which it was converted")
    if not pickles:
        hint = "download or copy the weights into the folder"
        return CheckpointError(f"{folder} holds no weights: found no *.safetensors", hint=hint)
    message = f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), and loading them can run code"
    hint = "use a revision with safetensors, or convert: model.save_pretrained(folder, safe_serialization=True)"
    return CheckpointError(message, hint=hint)
