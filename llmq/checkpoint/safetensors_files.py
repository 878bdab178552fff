"""Safetensors files: read a header, read one tensor, and write new files from the tensors of other files.

    byte 0          8           8 + n                                  end
         | n as u64 | JSON, n B | tensor 0 | tensor 1 | ...               |      little-endian

The JSON maps a name to {"dtype", "shape", "data_offsets": [first, last]}, with offsets from byte 8 + n. It may hold
"__metadata__" (text to text). The tensors fill the rest of the file without gaps. Source: the README of
huggingface/safetensors.

The safetensors package maps a whole file into memory to read one tensor. The mapping counts in full against a limit on
address space (RLIMIT_AS, set by batch systems), and its touched pages stay resident. llmq seeks and reads instead, so
that peak memory is one tensor, whatever the size of the shard. llmq also writes files itself: the package reports "no
space left" without an errno, and cannot copy from file to file.

Every value of a header is checked. Big-endian machines are not supported.

A file of the staging folder has a SHA-256 per tensor, taken from the values in memory when the file was written. Every
later read and copy of such a tensor compares it, so bytes that changed on the disk never become part of a model.
"""

import hashlib
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

PYTORCH = MappingProxyType({"format": "pt"})  # transformers requires this metadata
COPY_AGAIN = "download or copy the file again"
REPEAT = "repeat the command: damaged blocks are computed again; check the disk and the memory of this machine"

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
    """The place of a tensor in its file: bytes [start, stop), counted from the start of the file.

    sha256  of its dtype, shape and bytes, if it was recorded when the file was written
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    sha256: str | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def is_float(self) -> bool:
        """Whether it has floats of two bytes or more; those of one byte are a packed weight."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1


_Source = TypeVar("_Source", Path, Tensor)
Part = tuple[Path, str, TensorInfo]  # a tensor in a file: the file, the name of the tensor in the new file, its place


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "check that the file exists and that you may read it"
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Read the header of a file as JSON text, and the size of the file in bytes. Raises CheckpointError."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        if prefix == b"version ":  # git's placeholder for a large file
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights", hint="run: git lfs pull")
        if len(prefix) < 8:
            raise _truncated(path, size, "at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            message = f"{path} is not a safetensors file: the header has {length} bytes, expected up to {_HEADER_LIMIT}"
            raise CheckpointError(message, hint=COPY_AGAIN)
        text = file.read(length)
        if len(text) < length:
            raise _truncated(path, size, f"at least {8 + length}")
        return text, size


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read where every tensor of a safetensors file is, in the order of the file.

    Raises CheckpointError if the file cannot be read, is truncated, or has an inconsistent header.
    """
    text, size = read_header_bytes(path)
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be parsed: {error}", hint=COPY_AGAIN) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is a {type(document).__name__}, expected an object", hint=COPY_AGAIN)
    begin = 8 + len(text)
    document.pop("__metadata__", None)
    infos = {name: _tensor_info(path, name, entry, begin) for name, entry in document.items()}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = begin
    for name, info in tensors.items():
        if info.start != end:
            message = f"{path}: tensor {name} starts at byte {info.start}, expected {end}, the end of the previous one"
            raise CheckpointError(message, hint=COPY_AGAIN)
        end = info.stop
    if size < end:
        raise _truncated(path, size, str(end))
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, expected {end}: bytes follow the last tensor", hint=COPY_AGAIN)
    return tensors


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Read one tensor; on the CPU, in newly allocated memory. Raises CheckpointError for a damaged file."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(info.start)
        _fill(path, file, data.numpy().data)
    if info.sha256 is not None:
        _compare(path, info, _sha256(info, data.numpy().data))
    return data.view(info.dtype).reshape(info.shape)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = PYTORCH, *, durable: bool = True
) -> dict[str, str]:
    """Write tensors, of any device and stride, as one safetensors file, completely or not at all.

    Returns the checksum of each tensor by its name. `durable`: see `atomic.replacing`.
    Raises StorageError if the file cannot be written, CheckpointError for a dtype that safetensors does not support.
    """
    order = _aligned([(tensor, name, TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes))
                      for name, tensor in tensors.items()])  # fmt: skip
    header = _header([(name, info) for _, name, info in order], metadata)
    checksums: dict[str, str] = {}
    with replacing(path, durable=durable) as file:
        file.write(header)
        for tensor, name, info in order:
            packed = tensor.detach().cpu().contiguous()
            flat = packed.as_strided((packed.numel(),), (1,))  # a tensor of one element may still have another stride
            data = flat.view(torch.uint8).numpy().data
            checksums[name] = _sha256(info, data).hexdigest()
            file.write(data)
    return checksums


def concatenate(path: Path, parts: Sequence[Part], metadata: Mapping[str, str] = PYTORCH) -> None:
    """Write one safetensors file from tensors in other files, a few megabytes at a time.

    The tensors keep the order of `parts`. If a tensor would then start at a byte that is not a multiple of its item
    size, the widest dtypes come first, because a reader that maps the file needs aligned pointers.
    Raises StorageError if the file cannot be written, CheckpointError if a part cannot be read or has another checksum
    than when it was written, or a name occurs twice.
    """
    order = _aligned(parts)
    header = _header([(name, info) for _, name, info in order], metadata)
    with replacing(path) as file:
        file.write(header)
        for source, _, info in order:
            for chunk in checked(source, info):
                file.write(chunk)


def copy_bytes(source: Path, start: int, stop: int, target: BinaryIO) -> None:
    """Append bytes [start, stop) of a file to `target`.  Raises CheckpointError if they cannot be read."""
    for chunk in _chunks(source, start, stop):
        target.write(chunk)


def _chunks(path: Path, start: int, stop: int) -> Iterator[memoryview]:
    # A generator, so that an OSError of the writer is not reported as an error of reading.
    buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            chunk = buffer[: stop - start]
            _fill(path, file, chunk)
            yield chunk
            start += len(chunk)


def checked(path: Path, info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor; at the end raises CheckpointError if they have another checksum than the recorded one."""
    digest = _sha256(info)
    for chunk in _chunks(path, info.start, info.stop):
        if info.sha256 is not None:
            digest.update(chunk)
        yield chunk
    if info.sha256 is not None:
        _compare(path, info, digest)


def _sha256(info: TensorInfo, data: memoryview | bytes = b"") -> "hashlib._Hash":
    digest = hashlib.sha256(f"{info.dtype} {list(info.shape)}".encode())
    digest.update(data)
    return digest


def _compare(path: Path, info: TensorInfo, digest: "hashlib._Hash") -> None:
    if digest.hexdigest() != info.sha256:
        message = f"{path} is damaged: bytes {info.start} to {info.stop} have changed since they were written"
        raise CheckpointError(message, hint=REPEAT)


def _fill(path: Path, file: Any, view: memoryview) -> None:
    missing = len(view)
    while missing:  # the system may return fewer bytes than requested; on Linux at most 2 GB
        count = file.readinto(view[len(view) - missing :])
        if not count:
            raise _truncated(path, file.tell(), f"at least {file.tell() + missing}")
        missing -= count


def _truncated(path: Path, size: int, expected: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: found {size} bytes, expected {expected}", hint=COPY_AGAIN)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a name occurs twice")
    "".join(document).encode()  # half a surrogate pair is valid JSON but not valid text: raises ValueError
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
            message = f"{path}: the entry of tensor {name} is invalid: {str(entry)[:200]}"
            raise CheckpointError(message, hint=COPY_AGAIN)
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        message = f"{path}: tensor {name} has dtype {dtype_name}, expected one of {', '.join(_DTYPES)}"
        raise CheckpointError(message)
    *leading, columns = shape or [1]
    columns, odd = divmod(columns, _VALUES_PER_ELEMENT.get(dtype, 1))
    if odd or math.prod(leading) * columns * dtype.itemsize != last - first:
        message = f"{path}: tensor {name} has {last - first} bytes, which does not match {dtype_name} of shape {shape}"
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
            raise CheckpointError(f"tensor {name} occurs twice in one file")
        if info.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has dtype {info.dtype}, which safetensors does not support")
        shape = list(info.shape)
        if info.dtype in _VALUES_PER_ELEMENT:
            shape[-1] *= _VALUES_PER_ELEMENT[info.dtype]
        stop = start + info.nbytes
        document[name] = {"dtype": _NAMES[info.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the first tensor starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text
