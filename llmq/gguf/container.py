"""A GGUF file as it lies on disk: its keys, and its tensors by their names there, one read at a time."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError, FormatError
from llmq.formats.codecs import gguf_blocks

# What the package gguf says to a file that is none, is cut short or has a type that it does not know.
BROKEN = (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error, UnicodeDecodeError)

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Info:
    """A tensor of the file: GGUF type, shape with the rows' length last, and where its bytes are."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Container:
    """An open file.

    path     where it lies
    tensors  name -> `Info`, in the order in which they lie

    Raises CheckpointError where it is no GGUF file or is cut short.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        with reading(path):
            size = path.stat().st_size
            try:
                opened = gguf.GGUFReader(path)
            except BROKEN as error:
                raise _damaged(path, error) from error
        self._fields = opened.fields
        self.tensors = {
            each.name: Info(
                each.tensor_type.name,
                tuple(int(n) for n in reversed(each.shape.tolist())),
                int(each.data_offset),
                int(each.n_bytes),
            )
            for each in opened.tensors
        }
        if any(info.offset + info.nbytes > size for info in self.tensors.values()):
            raise _damaged(path, "its tensors reach beyond its end")

    def value(self, key: str) -> Any:
        """What stands under a key; None where there is none."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        found = self.value("general.architecture")
        if not isinstance(found, str):
            raise _damaged(self.path, "it does not name its architecture")
        return found

    def size(self) -> tuple[int, float | None]:
        """Bytes of all tensors together, and bits per quantized weight; None where none is quantized."""
        packed = [info for info in self.tensors.values() if info.kind not in FLOATS]
        weights = sum(math.prod(info.shape) for info in packed)
        bits = 8 * sum(info.nbytes for info in packed) / weights if weights else None
        return sum(info.nbytes for info in self.tensors.values()), bits

    def rows(self, name: str, part: int | None = None) -> NDArray[np.uint8]:
        """(N, bytes of a row) of a tensor; of a stack of them, the one numbered `part`, or all below each other."""
        info = self.info(name)
        count = 1 if part is None else info.shape[0]
        nbytes = info.nbytes // count
        with reading(self.path):
            found = np.fromfile(self.path, np.uint8, nbytes, offset=info.offset + (part or 0) * nbytes)
        if len(found) != nbytes:
            raise _damaged(self.path, f"{name} is cut short")
        return found.reshape(math.prod(info.shape[(part is not None) : -1]), -1)

    def floats(self, name: str, part: int | None = None) -> Tensor:
        """A tensor as float32, dequantized where it is packed."""
        info, rows = self.info(name), self.rows(name, part)
        shape = info.shape if part is None else info.shape[1:]
        return torch.from_numpy(decode(info.kind, rows)).reshape(shape)

    def info(self, name: str) -> Info:
        """Type, shape and place of a tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.tensors[name]


def decode(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, bytes of a row) -> (N, K), by llmq's own code, for the types that it lacks by the package gguf's."""
    if kind in gguf_blocks.SIZES:
        return gguf_blocks.decode(kind, rows)
    import gguf

    try:
        found: NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise FormatError(
            f"GGUF type {kind} cannot be read", hint="llama.cpp's `llama-quantize --allow-requantize` makes another"
        ) from error
    return found


def dequantize(path: Path) -> Iterator[tuple[str, Tensor]]:
    """`(name, weight)` for every quantized tensor, under its name in the file: (N, K) float32, experts (E, N, K)."""
    container = Container(path)
    for name, info in container.tensors.items():
        if info.kind not in FLOATS:
            yield name, container.floats(name)


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is no GGUF file, or not all of it: {why}", hint="copy or download it again")
