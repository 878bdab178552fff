"""The layout of staged blocks in a run with a native GGUF grid: each weight as the bytes of the final file.

    gguf_q4_k   uint8 (N, bytes of a row)     the suffix is the block type
    gguf_q6_k   …

The staged bytes are those of the final file, so an interrupted run continues to the same file; `export/save.py`
assembles it.  No engine reads this layout, and its settings are never written to a config.json.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Layout, Reader, Reading
from llmq.formats.codecs import checks, gguf_blocks, gguf_iq4, gguf_k_quants
from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.quantized_tensor import QuantizedTensor, Superblocks
from llmq.numerics.scheme import WeightScheme

NAME = "gguf"
PREFIX = "gguf_"
SUFFIXES = tuple(f"{PREFIX}{name}" for name in BLOCK_TYPES)


_WITHOUT_OFFSETS: Mapping[str, tuple[Callable[..., NDArray[np.uint8]], Callable[..., Any]]] = {
    **gguf_k_quants.CENTRED,
    **gguf_iq4.TYPES,
}
"""Type -> how codes, d and sc are packed and unpacked."""


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    kind = q.scheme.block_type
    if kind is None:
        raise FormatError(f"the grid of a tensor is {q.scheme}, expected one of {', '.join(BLOCK_TYPES)}")
    return {f"{PREFIX}{kind}": torch.from_numpy(pack_blocks(q))}


def pack_blocks(q: QuantizedTensor) -> NDArray[np.uint8]:
    """A weight on the grid of a block type -> uint8 (N, bytes of a row)."""
    codes, parts = q.codes.cpu().numpy(), q.superblocks
    if parts is None:
        halves = q.scales.to(torch.float16).cpu().numpy()
        if q.scheme.block_type in ("q4_0", "q5_0"):
            return (gguf_blocks.pack_q4_0 if q.scheme.block_type == "q4_0" else gguf_blocks.pack_q5_0)(codes, halves)
        return gguf_blocks.pack_q8_0((codes.astype(np.int16) - q.scheme.middle).astype(np.int8), halves)
    d, sc, kind = parts.d.cpu().numpy(), parts.sc.cpu().numpy(), str(q.scheme).upper()
    if parts.dmin is None or parts.m is None:
        return _WITHOUT_OFFSETS[kind][0](codes, d, sc)
    if q.scheme.block_type == "q4_1":
        return gguf_blocks.pack_q4_1(codes, d, -parts.dmin.cpu().numpy())
    return gguf_k_quants.MINIMA[kind][0](codes, d, parts.dmin.cpu().numpy(), sc, parts.m.cpu().numpy())


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    scheme = reading.scheme
    kind = scheme.block_type
    if kind is None:
        raise FormatError(f"the staged blocks are declared as {scheme}, expected one of {', '.join(BLOCK_TYPES)}")
    raw = checks.stored(tensors, f"{PREFIX}{kind}", (torch.uint8,), (None, None)).cpu().numpy()
    if kind.upper() in gguf_k_quants.MINIMA:
        minima = gguf_k_quants.MINIMA[kind.upper()][1](raw)
        parts = Superblocks(*map(_tensor, (minima.d, minima.sc, minima.dmin, minima.m)))
        return QuantizedTensor.of_superblocks(_tensor(minima.codes), parts, scheme)
    if kind.upper() in _WITHOUT_OFFSETS:
        blocks = _WITHOUT_OFFSETS[kind.upper()][1](raw)
        parts = Superblocks(_tensor(blocks.d), _tensor(blocks.sc))
        return QuantizedTensor.of_superblocks(_tensor(blocks.codes), parts, scheme)
    if kind == "q4_1":
        codes, d, m = gguf_blocks.unpack_q4_1(raw)
        ones = torch.ones(d.shape, dtype=torch.uint8)
        return QuantizedTensor.of_superblocks(_tensor(codes), Superblocks(_tensor(d), ones, _tensor(-m), ones), scheme)
    if kind in ("q4_0", "q5_0"):
        codes, scales = (gguf_blocks.unpack_q4_0 if kind == "q4_0" else gguf_blocks.unpack_q5_0)(raw)
    else:
        signed, scales = gguf_blocks.unpack_q8_0(raw)
        codes = (signed.astype(np.int16) + scheme.middle).astype(np.uint8)
    return QuantizedTensor(_tensor(codes), _tensor(scales), None, scheme)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    kind = BLOCK_TYPES[str(reading.scheme)]
    N, row = shapes[f"{PREFIX}{reading.scheme}"]
    return N, row // kind.nbytes * kind.columns


def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if scheme.block_type is None:
        return f"{scheme} is not the grid of a GGUF block type; these are {', '.join(BLOCK_TYPES)}"
    columns = BLOCK_TYPES[scheme.block_type].columns
    if in_features % columns:
        return f"{scheme} needs rows of a multiple of {columns} weights, and there are {in_features} input features"
    return None


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: blocks hold float16."""
    return torch.float16


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.  Only llmq reads it, while the run is not finished."""
    return {"quant_method": NAME, "block_types": {name: str(scheme) for name, scheme in schemes.items()}}


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Layout.read_config`."""
    declared = checks.mapping(checks.declared(config, "block_types"), "block_types")
    readings = {name: Reading(WeightScheme.of_blocks(kind)) for name, kind in declared.items()}
    return readings.get


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


LAYOUT = Layout(
    name=NAME,
    suffixes=SUFFIXES,
    codes=SUFFIXES,
    pack=pack,
    unpack=unpack,
    weight_shape=weight_shape,
    refusal=refusal,
    scale_dtype=scale_dtype,
    quantization_config=quantization_config,
    read_config=read_config,
)
