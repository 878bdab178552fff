"""One safetensors file: its header, one tensor of it, and new files put together from tensors of others.

    byte 0          8           8 + n                                  end
         | n as u64 | JSON, n B | tensor 0 | tensor 1 | ...               |      little-endian

The JSON maps a name to {"dtype", "shape", "data_offsets": [first, last]}, offsets counted from byte 8 + n, and may hold
"__metadata__" (text to text).  The tensors fill the rest of the file without holes.  Source: the README of
huggingface/safetensors.

The safetensors package maps a whole file into memory to read one tensor of it.  A mapping counts in full against a
limit on address space (RLIMIT_AS, which batch systems set) and its touched pages stay resident, so llmq seeks and
reads instead: peak memory is the one tensor that was asked for, whatever the size of the shard.  It writes on its own
too: the package turns "no space left" into an error without an errno, and cannot copy from file to file.

Nothing in a header is believed before it is checked.  Big-endian machines are not covered.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from llmq.checkpoint.atomic import replacing
from llmq.errors import CheckpointError

PYTORCH = MappingProxyType({"format": "pt"})  # transformers asks for this in a file's metadata
COPY_AGAIN = "download or copy the file again"

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors package has the same limit
_CHUNK = 4 << 20  # bytes copied at a time
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_VALUES_PER_ELEMENT = {torch.float4_e2m1fn_x2: 2}  # the file counts values in the last dimension, torch counts bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: bytes [start, stop), counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


_Source = TypeVar("_Source", Path, Tensor)
Part = tuple[Path, str, TensorInfo]  # a tensor in a file: the file, the name the tensor gets, where it lies


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Every OSError inside becomes a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "check that the file is there and that you may read it"
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON text of a file's header, unparsed, and the size of the file in bytes.  Raises CheckpointError."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        if prefix == b"version ":  # what git leaves in place of a large file
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights", hint="run: git lfs pull")
        if len(prefix) < 8:
            raise _cut_short(path, size, "at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            message = f"{path} is no safetensors file: its header has {length} bytes, expected at most {_HEADER_LIMIT}"
            raise CheckpointError(message, hint=COPY_AGAIN)
        text = file.read(length)
        if len(text) < length:
            raise _cut_short(path, size, f"at least {8 + length}")
        return text, size


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order in which they lie.

    Raises CheckpointError if the file cannot be read, is cut short, or its header contradicts itself.
    """
    text, size = read_header_bytes(path)
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not understood: {error}", hint=COPY_AGAIN) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is a {type(document).__name__}, expected an object", hint=COPY_AGAIN)
    begin = 8 + len(text)
    document.pop("__metadata__", None)
    found = {name: _tensor_info(path, name, entry, begin) for name, entry in document.items()}
    tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = begin
    for name, info in tensors.items():
        if info.start != end:
            message = f"{path}: tensor {name} starts at byte {info.start}, the one before it ends at byte {end}"
            raise CheckpointError(message, hint=COPY_AGAIN)
        end = info.stop
    if size < end:
        raise _cut_short(path, size, str(end))
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, expected {end}: bytes follow the last tensor", hint=COPY_AGAIN)
    return tensors


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """One tensor, on the CPU, in memory of its own.  Raises CheckpointError if the file ends before the tensor does."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(info.start)
        _fill(path, file, data.numpy().data)
    return data.view(info.dtype).reshape(info.shape)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read from the disk whenever it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = read_header(path)

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._path, self._header[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor
        return name in self._header


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = PYTORCH, *, durable: bool = True
) -> None:
    """Write tensors, of any device and stride, as one safetensors file that appears whole or not at all.

    `durable` is that of `atomic.replacing`.
    Raises StorageError if it cannot be written, CheckpointError for a dtype that safetensors lacks.
    """
    order = _aligned([(tensor, name, TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes))
                      for name, tensor in tensors.items()])  # fmt: skip
    header = _header([(name, info) for _, name, info in order], metadata)
    with replacing(path, durable=durable) as file:
        file.write(header)
        for tensor, _, _ in order:
            packed = tensor.detach().cpu().contiguous()
            flat = packed.as_strided((packed.numel(),), (1,))  # one element alone may keep a stride through all this
            file.write(flat.view(torch.uint8).numpy().data)


def concatenate(path: Path, parts: Sequence[Part], metadata: Mapping[str, str] = PYTORCH) -> None:
    """Write one safetensors file from tensors that lie in other files, a few megabytes at a time.

    The tensors keep the order of `parts`, unless one would then start at a byte that is no multiple of its item size (a
    reader that maps the file would get a misaligned pointer): then the widest dtypes come first, otherwise in order.
    Raises StorageError if it cannot be written, CheckpointError if a part cannot be read or a name comes twice.
    """
    order = _aligned(parts)
    header = _header([(name, info) for _, name, info in order], metadata)
    with replacing(path) as file:
        file.write(header)
        for source, _, info in order:
            copy_bytes(source, info.start, info.stop, file)


def copy_bytes(source: Path, start: int, stop: int, target: BinaryIO) -> None:
    """Append bytes [start, stop) of a file to `target`.  Raises CheckpointError if they cannot be read."""
    for chunk in _chunks(source, start, stop):
        target.write(chunk)


def _chunks(path: Path, start: int, stop: int) -> Iterator[memoryview]:
    # A generator, so that an OSError of the one who writes is not taken for one of reading.
    buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            chunk = buffer[: stop - start]
            _fill(path, file, chunk)
            yield chunk
            start += len(chunk)


def _fill(path: Path, file: Any, view: memoryview) -> None:
    missing = len(view)
    while missing:  # the system may hand over less than was asked, 2 GB at most on Linux
        count = file.readinto(view[len(view) - missing :])
        if not count:
            raise _cut_short(path, file.tell(), f"at least {file.tell() + missing}")
        missing -= count


def _cut_short(path: Path, found: int, expected: str) -> CheckpointError:
    return CheckpointError(f"{path} is cut short: found {found} bytes, expected {expected}", hint=COPY_AGAIN)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a name comes twice")
    "".join(document).encode()  # half a surrogate pair is legal JSON, but no text: raises ValueError
    return document


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor_info(path: Path, name: str, entry: Any, begin: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [first, last]} if (
            _is_size(first) and _is_size(last) and first <= last and all(map(_is_size, shape))
        ):
            pass
        case _:
            message = f"{path}: the entry of tensor {name} is not understood: {str(entry)[:200]}"
            raise CheckpointError(message, hint=COPY_AGAIN)
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        message = f"{path}: tensor {name} has dtype {dtype_name}, expected one of {', '.join(_DTYPES)}"
        raise CheckpointError(message)
    *leading, columns = shape or [1]
    columns, odd = divmod(columns, _VALUES_PER_ELEMENT.get(dtype, 1))
    if odd or math.prod(leading) * columns * dtype.itemsize != last - first:
        message = f"{path}: tensor {name} has {last - first} bytes, which is not {dtype_name} of shape {shape}"
        raise CheckpointError(message, hint=COPY_AGAIN)
    return TensorInfo(dtype, (*leading, columns) if shape else (), begin + first, begin + last)


def _aligned(parts: Sequence[tuple[_Source, str, TensorInfo]]) -> list[tuple[_Source, str, TensorInfo]]:
    start = 0
    for _, _, info in parts:
        if start % info.dtype.itemsize:
            return sorted(parts, key=lambda part: -part[2].dtype.itemsize)  # stable
        start += info.nbytes
    return list(parts)


def _header(named: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, info in named:
        if name in document:
            raise CheckpointError(f"tensor {name} would be written twice into one file")
        if info.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has dtype {info.dtype}, which a safetensors file cannot hold")
        shape = list(info.shape)
        if info.dtype in _VALUES_PER_ELEMENT:
            shape[-1] *= _VALUES_PER_ELEMENT[info.dtype]
        stop = start + info.nbytes
        document[name] = {"dtype": _NAMES[info.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the first tensor starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text
