"""The header of a GGUF file: its keys, and where its tensors are.

    "GGUF"  u32 version  u64 tensors  u64 keys                             little-endian
    keys     text, u32 type, value                                         text: u64 length, UTF-8
    tensors  text, u32 dimensions, u64 each, u32 block type, u64 offset    offsets from the start of the data
    padding, data

The reader of the package gguf believes what a file says: a wrong count keeps it busy for ever or fills the memory, and
tensors may overlap.  Here every number is checked against the size of the file before it is used, and the rules of
llama.cpp hold: dimensions are positive, tensors follow one another, and the last one ends with the file.  Values of
keys are read on request.

Source: ggml/docs/gguf.md and ggml/src/gguf.cpp of llama.cpp.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError

VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
DIMENSIONS = 4  # at most
TEXT, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct
SHORTEST_KEY, SHORTEST_TENSOR = 13, 32  # bytes


@dataclass(frozen=True)
class Info:
    """A tensor of the file: GGUF type, shape (the length of a row last), and the place of its bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header:
    """The header of a file.

    tensors  name -> `Info`, in the order of the file

    Raises CheckpointError if it is not a GGUF file, is truncated or is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, tuple[int, int]] = {}  # key -> type, and the place of the value
        with reading(path), path.open("rb") as file:
            self._size = path.stat().st_size
            tensors, keys = self._start(file)
            for _ in range(keys):
                self._read_key(file)
            declared = [self._read_tensor(file) for _ in range(tensors)]
            self.tensors = self._placed(declared, file.tell())

    @property
    def keys(self) -> list[str]:
        """All keys, in the order of the file."""
        return list(self._values)

    def value(self, key: str) -> Any:
        """The value of a key: a number, a text, or a list of them; None if there is no such key."""
        if key not in self._values:
            return None
        kind, place = self._values[key]
        with reading(self._path), self._path.open("rb") as file:
            file.seek(place)
            if kind != ARRAY:
                return self._scalar(file, kind)
            inner, count = self._numbers(file, "IQ")
            return [self._scalar(file, inner) for _ in range(count)]

    def _start(self, file: BinaryIO) -> tuple[int, int]:
        if file.read(4) != b"GGUF":
            raise damaged(self._path, "it does not start with GGUF")
        (version,) = self._numbers(file, "I")
        if version not in VERSIONS:
            raise damaged(self._path, f"its version is {version}, expected 2 or 3 in little-endian order")
        tensors, keys = self._numbers(file, "QQ")
        self._require(file, tensors * SHORTEST_TENSOR + keys * SHORTEST_KEY, f"{tensors} tensors and {keys} keys")
        return tensors, keys

    def _read_key(self, file: BinaryIO) -> None:
        name = self._text(file)
        (kind,) = self._numbers(file, "I")
        if name in self._values:
            raise damaged(self._path, f"the key {name!r} occurs twice")
        self._values[name] = kind, file.tell()
        if kind != ARRAY:
            self._scalar(file, kind)
            return
        inner, count = self._numbers(file, "IQ")
        if inner == TEXT:
            self._require(file, 8 * count, f"{count} texts in {name!r}")
            for _ in range(count):
                (length,) = self._numbers(file, "Q")
                self._skip(file, length, f"a text in {name!r}")
        elif inner in FORMATS:
            self._skip(file, count * struct.calcsize(FORMATS[inner]), f"{count} values in {name!r}")
        else:
            raise damaged(self._path, f"the key {name!r} holds a list of values of type {inner}")

    def _read_tensor(self, file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, and offset in the data."""
        name = self._text(file)
        (dimensions,) = self._numbers(file, "I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise damaged(self._path, f"{name} has {dimensions} dimensions, expected 1 to {DIMENSIONS}")
        shape = self._numbers(file, "Q" * dimensions)[::-1]
        if not all(shape):
            raise damaged(self._path, f"{name} has the shape {shape}, expected no zeros")
        return name, shape, *self._numbers(file, "IQ")

    def _placed(self, declared: list[tuple[str, tuple[int, ...], int, int]], end: int) -> dict[str, Info]:
        """The tensors with their places in the file, whose header ends at byte `end`."""
        alignment = self.value(ALIGNMENT) or DEFAULT_ALIGNMENT
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise damaged(self._path, f"its alignment is {alignment!r}, expected a power of two")
        start = position = _padded(end, alignment)
        tensors: dict[str, Info] = {}
        for name, shape, kind, offset in declared:
            if name in tensors:
                raise damaged(self._path, f"tensor {name} occurs twice")
            if start + offset != position:
                message = f"tensor {name} starts at byte {start + offset}, expected {position}, after the previous one"
                raise damaged(self._path, message)
            type_name, nbytes = self._stored(name, shape, kind)
            tensors[name] = Info(type_name, shape, position, nbytes)
            end = position + nbytes
            position = _padded(end, alignment)
        if tensors and not end <= self._size < position + alignment:
            raise damaged(self._path, f"it has {self._size} bytes, expected {end} with its tensors")
        return tensors

    def _stored(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        """The name of a type, and the bytes of a tensor."""
        import gguf

        try:
            known = gguf.GGMLQuantizationType(kind)
            weights, size = gguf.GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise damaged(self._path, f"{name} has the type {kind}, which the package gguf does not know") from None
        if shape[-1] % weights:
            message = f"{name} has rows of {shape[-1]} values, expected multiples of {weights} for {known.name}"
            raise damaged(self._path, message)
        return known.name, math.prod(shape) // weights * size

    def _scalar(self, file: BinaryIO, kind: int) -> Any:
        if kind == TEXT:
            return self._text(file)
        if kind not in FORMATS:
            raise damaged(self._path, f"a value has the type {kind}, which GGUF does not have")
        return self._numbers(file, FORMATS[kind])[0]

    def _text(self, file: BinaryIO) -> str:
        (length,) = self._numbers(file, "Q")
        self._require(file, length, f"a text of {length} bytes")
        try:
            return file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self._path, f"a text is not UTF-8: {error.reason}") from None

    def _numbers(self, file: BinaryIO, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        data = file.read(size)
        if len(data) < size:
            raise damaged(self._path, f"it ends at byte {self._size}, inside of its header")
        return struct.unpack(f"<{form}", data)

    def _skip(self, file: BinaryIO, size: int, what: str) -> None:
        self._require(file, size, what)
        file.seek(size, 1)

    def _require(self, file: BinaryIO, size: int, what: str) -> None:
        left = self._size - file.tell()
        if size > left:
            raise damaged(self._path, f"its header declares {what}, but only {left} bytes follow")


def damaged(path: Path, why: object) -> CheckpointError:
    """The error for a file that cannot be read."""
    return CheckpointError(f"{path} is not a complete GGUF file: {why}", hint="copy or download it again")


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
