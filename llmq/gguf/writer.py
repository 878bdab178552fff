"""Write a GGUF file from the folder of a model and a list of tensors.

Tensors are given with their Hugging Face names and are read one at a time, when they are written.  The writer makes the
same changes as llama.cpp's converter: names, the order of rows and values of float tensors (`changes.py`), and experts
stacked in one tensor.  Rows are moved as a whole, so blocks do not change.

The file gets its final name when it is complete.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.checkpoint.atomic import PARTIAL, storing, sync_file, sync_folder
from llmq.errors import FormatError
from llmq.formats.codecs import gguf_blocks
from llmq.gguf.changes import Order, Value, in_columns
from llmq.gguf.experts import separated
from llmq.gguf.metadata import add_general, add_sizes
from llmq.gguf.names import Names
from llmq.gguf.stored import Stored
from llmq.gguf.supported import architecture, language_config
from llmq.gguf.tokenizer import add_tokenizer
from llmq.model.build.skeleton import load_config

Array = NDArray[Any]
IN_FLOAT = (".ffn_gate_inp.", "conv", "position_embd")
"""Parts of the names of tensors with several dimensions that llama.cpp reads in F32 only."""

FILE_TYPES: Mapping[str, str] = MappingProxyType({f"Q{bits}_K": f"Q{bits}_K_S" for bits in (3, 4, 5)})
"""Type of all weights -> `general.file_type`, where that has another name: S is llama.cpp's smallest mixture."""


@dataclass(frozen=True)
class Written:
    """The content of the written file.

    kinds    GGUF name -> type
    skipped  Hugging Face names of tensors that a GGUF file of this architecture does not hold or does not need
    notes    for the user
    """

    file: Path
    kinds: dict[str, str]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Type -> the number of tensors of this type."""
        return dict(Counter(self.kinds.values()))


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: rows of one tensor of the model, or the experts of a layer in their order.

    rows   which rows of every part; None for all, in their order
    value  what changes in the values
    columns  the order of its columns; None for that of the model
    """

    name: str
    kind: str
    parts: tuple[Stored, ...]
    stacked: bool
    rows: Order | None = None
    value: Value | None = None
    columns: Order | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        if self.rows is not None:
            shape = (len(self.rows), *shape[1:])
        if self.value is not None and self.kind not in gguf_blocks.QUANTIZED:
            shape = self.value.shape(shape)
        return (len(self.parts), *shape) if self.stacked else shape

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        *outer, columns = self.shape
        return (*outer, gguf_blocks.row_bytes(self.kind, columns))


def write(file: Path, folder: Path, tensors: Iterable[Stored], recipe: str | None = None) -> Written:
    """Write `file`; `folder` holds config, tokenizer and all other files that describe the model.

    recipe  llama.cpp's name of the mixture of types, for `general.file_type`; None: the type of most weights

    Raises UnsupportedModelError and FormatError for a model that llama.cpp cannot run, StorageError if writing fails.
    """
    import gguf

    config = language_config(load_config(folder, remote_code=False).to_dict())
    arch = architecture(config)
    entries, skipped = _entries(separated(tensors, arch.stacked), Names(arch, config))
    partial = file.with_name(f".{file.name}{PARTIAL}")
    writer = gguf.GGUFWriter(partial, arch.name)
    vocabulary = add_tokenizer(writer, folder, config, _vocabulary(entries))
    parameters = sum(math.prod(entry.shape) for entry in entries)
    general = add_general(writer, folder, file.stem, parameters, _file_type(entries, recipe), vocabulary.tokens)
    extra = add_sizes(writer, config, arch)
    notes, moved = [*general, *extra.notes, *vocabulary.notes], dict[str, float]()
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        size = math.prod(entry.bytes_shape)
        writer.add_tensor_info(entry.name, entry.bytes_shape, np.dtype(np.uint8), size, raw_dtype=kind)
    for name, values in extra.tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    with storing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(_data(entry, moved))
            for values in extra.tensors.values():
                writer.write_tensor_data(values)
            writer.close()
            sync_file(partial)
            partial.replace(file)
        except BaseException:  # also for Ctrl-C: the partial file must not take up space
            writer.close()
            partial.unlink(missing_ok=True)
            raise
        sync_folder(file.parent)
    if moved:
        most = max(moved, key=lambda name: moved[name])
        notes.append(
            f"{len(moved)} tensors are stored as F16, which changes their values by at most {moved[most]:.1e} ({most})"
        )
    kinds = {**{entry.name: entry.kind for entry in entries}, **dict.fromkeys(extra.tensors, "F32")}
    return Written(file, kinds, tuple(skipped), tuple(notes))


def _entries(tensors: Iterable[Stored], names: Names) -> tuple[list[_Entry], list[str]]:
    """The tensors of the file, in the given order, and the names of those that are skipped."""
    by_place: dict[str, dict[int | None, Stored]] = {}
    orders: dict[str, Order | None] = {}
    skipped, unknown = [], []
    for tensor in tensors:
        if names.is_left_out(tensor.name):
            skipped.append(tensor.name)
        elif not (places := names.places(tensor.name)):
            unknown.append(tensor.name)
        else:
            for place in places:
                by_place.setdefault(place.name, {})[place.expert] = tensor
                orders[place.name] = place.rows
    if unknown:
        raise FormatError(
            f"llama.cpp's architecture has no tensor for {', '.join(unknown[:4])}"
            + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""),
            hint="use a safetensors format, which can hold any model",
        )
    return [_entry(name, parts, orders[name], names) for name, parts in by_place.items()], skipped


def _entry(name: str, parts: Mapping[int | None, Stored], rows: Order | None, names: Names) -> _Entry:
    stacked = None not in parts
    ordered = tuple(parts[i] for i in sorted(parts, key=lambda expert: -1 if expert is None else expert))
    if stacked and sorted(parts, key=str) != sorted(range(len(parts)), key=str):
        raise FormatError(f"some experts of {name} are missing, it has only {sorted(map(str, parts))}")
    kinds, shapes = {part.kind for part in ordered}, {part.shape for part in ordered}
    if len(kinds) > 1 or len(shapes) > 1:
        raise FormatError(
            f"{name} holds all experts of a layer in one type, but these have {sorted(map(str, kinds))}",
            hint="quantize all experts of a layer with the same settings",
        )
    kind = ordered[0].kind
    if kind is None:
        small = len(ordered[0].shape) == 1 or any(part in name for part in IN_FLOAT)
        kind = "F32" if small else "F16"
    return _Entry(name, kind, ordered, stacked, rows, names.value(name), names.columns(name))


def _data(entry: _Entry, moved: dict[str, float]) -> Array:
    """The bytes of a tensor as in the file."""
    rows = [_rows(entry, part, moved) for part in entry.parts]
    return (np.stack(rows) if entry.stacked else rows[0]).reshape(entry.bytes_shape)


def _rows(entry: _Entry, part: Stored, moved: dict[str, float]) -> Array:
    rows = part.read() if entry.rows is None else part.read()[entry.rows]
    if entry.columns is not None:
        block = gguf_blocks.SIZES[entry.kind][0] if entry.kind in gguf_blocks.QUANTIZED else 1
        rows = in_columns(rows, entry.columns, block)
    if entry.kind in gguf_blocks.QUANTIZED:
        return np.ascontiguousarray(rows)
    weight = np.asarray(rows, dtype=np.float32)
    if entry.value is not None:
        weight = entry.value.forward(weight)
    packed = gguf_blocks.pack_float(entry.kind, weight.reshape(-1, weight.shape[-1]))
    if entry.kind == "F16":
        _check_halves(part.name, weight, packed, moved)
    return packed


def _check_halves(name: str, weight: Array, packed: Array, moved: dict[str, float]) -> None:
    halves, error = packed.view(np.float16).reshape(weight.shape), 0.0
    for one, other in zip(weight, halves, strict=True):  # a row at a time: an embedding is large
        error = max(error, float(np.abs(one - other.astype(np.float32)).max(initial=0.0)))
    if not math.isfinite(error):
        raise FormatError(f"{name} has values beyond the range of F16, expected at most {np.finfo(np.float16).max:g}")
    if error:
        moved[name] = error


def _vocabulary(entries: Iterable[_Entry]) -> int:
    for entry in entries:
        if entry.name == "token_embd.weight":
            return entry.shape[0]
    raise FormatError("the model has no embedding among its tensors", hint="is the checkpoint complete?")


def _file_type(entries: Iterable[_Entry], recipe: str | None) -> int:
    """The value of `general.file_type`."""
    import gguf

    weights: Counter[str] = Counter()
    for entry in entries:
        if entry.kind in gguf_blocks.QUANTIZED:
            weights[entry.kind] += math.prod(entry.shape)
    name = recipe.upper() if recipe else max(weights, key=lambda kind: weights[kind], default="F16")
    return int(gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES.get(name, name)}"])
