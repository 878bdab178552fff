"""Reads the weights of files that llmq wrote with NumPy only: no torch, and no import of llmq.

    from llmq_kernels import files
    for name, weight in files.dequantize("OUT"): ...      # (N, K) float32

This is the shortest description of such a file: a header with the position of each tensor, codes as one stream of bits,
and  w = (code - zero) * scale  in float32.  It reads what llmq writes (compressed-tensors, gptq and awq, and .gguf
through the package gguf, which needs only NumPy too); other tools write variants of these, which `llmq.dequantize`
reads.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds output 0, 1, … of eight
HEADER_BYTES = 8
FLOATS = ("F32", "F16", "BF16")  # GGUF types that are not packed


def dequantize(path: str | Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """`(name, weight)` of every packed weight: (N, K) float32, under the name in the original model.

    `path` is a folder or a .gguf file; the latter has GGUF's names and experts (E, N, K).  Raises OSError if files are
    missing, ValueError for a checkpoint that llmq does not write, ImportError for a .gguf without the package gguf.
    """
    folder = Path(path)
    gguf_files = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if len(gguf_files) == 1 and not any(folder.glob("*.safetensors")):
        yield from gguf(gguf_files[0])
        return
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    method = settings.get("quant_method")
    if method not in ("compressed-tensors", "gptq", "awq"):
        raise ValueError(f"the quant_method is {method!r}, expected compressed-tensors, gptq or awq")
    tensors = Tensors(folder)
    groups = (settings.get("config_groups") or {}).values()
    declared = sorted({group["weights"]["num_bits"] for group in groups}) or WIDTHS
    mark = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    for name in tensors:
        if name.endswith(mark):
            module = name.removesuffix(mark)
            parts = tensors.of(module)
            if method == "compressed-tensors":
                yield f"{module}.weight", compressed_tensors(parts, declared)
            elif method == "gptq":
                yield f"{module}.weight", gptq(parts, settings.get("checkpoint_format", "gptq"))
            else:
                yield f"{module}.weight", awq(parts)


def gguf(file: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """`(name, weight)` of every tensor of a .gguf file that is packed in blocks."""
    from gguf import GGUFReader
    from gguf.quants import dequantize as decoded

    for tensor in GGUFReader(file).tensors:
        if tensor.tensor_type.name not in FLOATS:
            yield tensor.name, decoded(tensor.data, tensor.tensor_type)


def compressed_tensors(parts: Mapping[str, Array], widths: Sequence[int] = WIDTHS) -> NDArray[np.float32]:
    """(N, K) from weight_packed (N, words), weight_scale (N, G), weight_shape (2,) and perhaps weight_zero_point.

    `widths` are the bits per code in the header; raises ValueError unless exactly one of them fits.
    """
    N, K = (int(size) for size in parts["weight_shape"])
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    fitting = [bits for bits in widths if math.ceil(K * bits / 32) == packed.shape[1]]
    if len(fitting) != 1:
        raise ValueError(
            f"{packed.shape[1]} words for {K} codes fit the bit widths {fitting}, expected one of {list(widths)}"
        )
    (bits,) = fitting
    codes = unpack(packed, bits)[:, :K]
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"].T, bits)[:, :N].T  # (N, G)
    else:
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    return _scaled(codes, zeros, scales)


def gptq(parts: Mapping[str, Array], version: str = "gptq") -> NDArray[np.float32]:
    """(N, K) from qweight (K * bits / 32, N), qzeros (G, N * bits / 32), scales (G, N), g_idx (K,)."""
    qweight, words, scales, index = (parts[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    bits = qweight.shape[0] * 32 // len(index)
    if version == "gptq":  # stored minus one; added to every field of a word at once
        words = (words.view(np.uint32) + np.uint32(0xFFFFFFFF // ((1 << bits) - 1))).view(np.int32)
    zeros, codes = unpack(words, bits), unpack(qweight.T, bits)  # (G, N), (N, K)
    centred = codes.astype(np.float32) - zeros.T.astype(np.float32)[:, index]
    weight: NDArray[np.float32] = centred * scales.T.astype(np.float32)[:, index]
    return weight


def awq(parts: Mapping[str, Array]) -> NDArray[np.float32]:
    """(N, K) from qweight (K, N / 8), qzeros (G, N / 8), scales (G, N)."""
    codes, zeros = (_in_order(unpack(parts[name], 4)).T for name in ("qweight", "qzeros"))
    return _scaled(codes, zeros, parts["scales"].T)


def unpack(words: Array, bits: int) -> NDArray[np.uint8]:
    """int32 (rows, words) -> uint8 (rows, codes): a stream of bits, the lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return np.packbits(codes, axis=2, bitorder="little")[:, :, 0]


class Tensors(Mapping[str, Array]):
    """The tensors of a folder of safetensors files, by name; each is read when it is used."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._ends: dict[str, list[str]] = {}  # by module
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(HEADER_BYTES), "little")
                header = json.loads(opened.read(size))
            for name, info in header.items():
                if name != "__metadata__":
                    self._places[name] = file, HEADER_BYTES + size, info
                    module, _, end = name.rpartition(".")
                    self._ends.setdefault(module, []).append(end)

    def __getitem__(self, name: str) -> Array:
        file, start, info = self._places[name]
        first, last = info["data_offsets"]
        with file.open("rb") as opened:
            opened.seek(start + first)
            data = opened.read(last - first)
        if info["dtype"] == "BF16":  # the upper half of a float32
            halves = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            return halves.view(np.float32).reshape(info["shape"])
        return np.frombuffer(data, DTYPES[info["dtype"]]).reshape(info["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def of(self, module: str) -> dict[str, Array]:
        """The tensors of one module, by the last part of their names."""
        return {end: self[f"{module}.{end}"] for end in self._ends[module]}


def _in_order(interleaved: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows = len(interleaved)
    return interleaved.reshape(rows, -1, len(AWQ_ORDER))[:, :, AWQ_ORDER].reshape(rows, -1)


def _scaled(codes: Array, zeros: Array, scales: Array) -> NDArray[np.float32]:
    """(N, K), (N, G), (N, G) -> (N, K)"""
    per_group = codes.shape[1] // scales.shape[1]
    zeros, scales = (np.repeat(part.astype(np.float32), per_group, axis=1) for part in (zeros, scales))
    weight: NDArray[np.float32] = (codes.astype(np.float32) - zeros) * scales
    return weight
