"""A GGUF file: its keys, and its tensors by their names in the file.  Tensors are read one at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError, FormatError
from llmq.formats.codecs import gguf_blocks
from llmq.gguf.header import Header, Info, damaged

FLOATS = ("F32", "F16", "BF16")


class Container:
    """An open file.

    path     of the file
    tensors  name -> `Info`, in the order of the file

    Raises CheckpointError where it is not a GGUF file, is truncated or is inconsistent (see `header.py`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = Header(path)
        self.tensors = self._header.tensors

    def value(self, key: str) -> Any:
        """The value of a key; None where there is none."""
        return self._header.value(key)

    def settings(self) -> dict[str, Any]:
        """The keys of the model itself, such as `rope.freq_base`, without the name of the architecture in front."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): self.value(key) for key in self._header.keys if key.startswith(prefix)}

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        name = self.value("general.architecture")
        if not isinstance(name, str):
            raise damaged(self.path, "the key general.architecture is missing")
        return name

    def size(self) -> tuple[int, float | None]:
        """Bytes of all tensors together, and bits per quantized weight (None where no weight is quantized)."""
        packed = [info for info in self.tensors.values() if info.kind not in FLOATS]
        weights = sum(math.prod(info.shape) for info in packed)
        bits = 8 * sum(info.nbytes for info in packed) / weights if weights else None
        return sum(info.nbytes for info in self.tensors.values()), bits

    def rows(self, name: str, part: int | None = None) -> NDArray[np.uint8]:
        """(N, bytes of a row) of a tensor; of a stack of matrices, number `part`, or all of them concatenated."""
        info = self.info(name)
        count = 1 if part is None else info.shape[0]
        nbytes = info.nbytes // count
        with reading(self.path):
            raw = np.fromfile(self.path, np.uint8, nbytes, offset=info.offset + (part or 0) * nbytes)
        if len(raw) != nbytes:
            raise damaged(self.path, f"{name} is truncated")
        return raw.reshape(math.prod(info.shape[(part is not None) : -1]), -1)

    def floats(self, name: str, part: int | None = None) -> Tensor:
        """A tensor in float32, dequantized if it is packed."""
        info, rows = self.info(name), self.rows(name, part)
        shape = info.shape if part is None else info.shape[1:]
        return torch.from_numpy(decode(info.kind, rows)).reshape(shape)

    def info(self, name: str) -> Info:
        """Type, shape and place of a tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.tensors[name]


def decode(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, bytes of a row) uint8 -> (N, K) float32.

    Types that llmq does not implement are decoded by the package gguf.
    """
    if kind in gguf_blocks.SIZES:
        return gguf_blocks.decode(kind, rows)
    import gguf

    try:
        weight: NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise FormatError(
            f"GGUF type {kind} cannot be read",
            hint="convert the file to another type with llama.cpp's `llama-quantize --allow-requantize`",
        ) from error
    return weight


def dequantize(path: Path) -> Iterator[tuple[str, Tensor]]:
    """`(name, weight)` for every quantized tensor, with its name in the file: (N, K) float32, experts (E, N, K)."""
    container = Container(path)
    for name, info in container.tensors.items():
        if info.kind not in FLOATS:
            yield name, container.floats(name)
