"""Convert a quantized checkpoint to a GGUF file without a second quantization.

The codes (quantized values) do not change, only their layout.  These types hold a grid exactly, bit for bit:

    up to 4 bits symmetric, 3 asymmetric, g a         Q4_0   d = scale, repeated for each 32 weights
        multiple of 32
    any, 5 bits or fewer, K a multiple of 256, g of   Q4_K   d = dmin = scale, every sub-block's sc = 1 and m = zero
        256, or one scale per row                     Q5_K   (4 and 5 bits)
    one bit more than Q4_0, g a multiple of 32        Q5_0   code - zero + 16 is in 0..31
    up to 8 bits symmetric, 7 asymmetric, likewise    Q8_0   d = scale

The smallest type that holds a weight exactly is used.  This is checked for every weight: the packed blocks are decoded
and compared bit for bit with the weight of the checkpoint.  Scales are fp16 in GGUF.  A scale that is not an fp16
number, or a grid that no type holds, is an error, unless requantization was requested.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import FormatError
from llmq.formats.codecs import gguf_blocks, gguf_k_quants
from llmq.gguf.stored import Stored
from llmq.gguf.writer import write
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.open_skeleton import compared

AUTO = "auto"
EXACT = ("Q4_0", "Q4_K", "Q5_K", "Q5_0", "Q8_0")  # sorted by size; Q4_K has as many bits as Q4_0
BITS = {"Q4_0": (4, True), "Q4_K": (4, False), "Q5_K": (5, False), "Q5_0": (5, True), "Q8_0": (8, True)}
"""Type -> bits of its codes, and whether these are code - zero; K-quants store the zero point separately."""
NEAREST = ("Q4_0", "Q5_0", "Q8_0")  # what a weight is requantized to, if that was requested
SMALLEST_BLOCK = 32
WEIGHTS_AT_ONCE = 1 << 22  # that are packed, decoded and compared together
REMEDY = "quantize with groups of 32 and symmetric (Q4_0), or convert with --allow-requantize, which loses precision"


@dataclass(frozen=True)
class Summary:
    """The content of the file.

    kinds    GGUF name -> type, of every tensor
    exact    Hugging Face names of the quantized weights that are in the file bit for bit
    rounded  Hugging Face name of each requantized weight -> the largest difference of a weight
    bits     bits per quantized weight, including scales
    skipped  tensors that the file does not need
    notes    for the user
    """

    file: Path
    kinds: dict[str, str]
    exact: tuple[str, ...]
    rounded: dict[str, float]
    bits: float
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Type -> the number of tensors of this type."""
        return dict(Counter(self.kinds.values()))


def export(folder: Path, file: Path, *, kind: str = AUTO, requantize: bool = False) -> Summary:
    """Write the checkpoint in `folder` to `file`.

    kind        "auto", or one of `EXACT` for every quantized weight (for example "Q8_0")
    requantize  round what no type holds exactly: a grid to Q4_0 (4 bits or fewer) or Q8_0, scales to fp16, rows that
                are not a multiple of a block to F16

    Raises FormatError where something would have to be rounded, UnsupportedModelError where llama.cpp cannot run the
    model, StorageError where the file cannot be written.
    """
    if kind not in (AUTO, *EXACT):
        raise FormatError(f"there is no GGUF type {kind!r} to export to", hint=f"use one of {AUTO}, {', '.join(EXACT)}")
    checkpoint = compared(Checkpoint.open(folder)).checkpoint
    if quantization_settings(checkpoint) is None:
        written = write(file, folder, _others(checkpoint, ()))
        return Summary(file, written.kinds, (), {}, 16.0, written.skipped, written.notes)
    weights = PackedWeights(checkpoint)
    packed = _Packed(weights, kind, requantize)
    written = write(file, folder, chain(packed.tensors(), _others(checkpoint, weights.modules)))
    return Summary(
        file, written.kinds, tuple(packed.exact), packed.rounded, packed.bits, written.skipped, written.notes
    )


def _others(checkpoint: Checkpoint, packed: Collection[str]) -> Iterator[Stored]:
    """The tensors that are not quantized.  Of a packed module this is only the bias."""
    modules = frozenset(packed)
    for name in checkpoint.names():
        module, _, suffix = name.rpartition(".")
        if module not in modules or suffix == "bias":
            yield Stored(name, None, checkpoint.info(name).shape, partial(_floats, checkpoint, name))


def _floats(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = checkpoint.tensor(name).to(torch.float32).numpy()
    return values


def best(scheme: WeightScheme, columns: int) -> str | None:
    """The smallest type that can hold such a grid exactly, if the scales fit too; None where there is none."""
    return next((kind for kind in EXACT if refusal(kind, scheme, columns) is None), None)


def refusal(kind: str, scheme: WeightScheme, columns: int) -> str | None:
    """Why a type cannot hold such a grid for rows of `columns` weights; None where it can, if the scales fit too."""
    weights, _ = gguf_blocks.SIZES[kind]
    if scheme.floats is not None:
        return f"gguf holds integers, not {scheme}; compressed-tensors holds both"
    if columns % weights:
        return f"{kind} needs rows of a multiple of {weights} weights, these have {columns}"
    if (group := scheme.columns_per_group(columns)) % weights:
        return f"{kind} has one scale per {weights} weights, the groups have {group}"
    largest, centred = BITS[kind]
    if centred and not scheme.symmetric:  # code - zero has a sign, which takes one bit
        largest -= 1
    if scheme.bits > largest:
        return f"{kind} holds {'symmetric' if scheme.symmetric else 'asymmetric'} codes of at most {largest} bits"
    return None


def pack(kind: str, q: QuantizedTensor) -> NDArray[np.uint8]:
    """(N, bytes of a row) uint8: the blocks of a weight, checked to be exactly equal to it.

    Raises FormatError where the type cannot hold it; nothing is rounded.
    """
    if not _in_order(q):
        raise FormatError(f"{kind} has groups in natural order, these are in activation order (g_idx)")
    if (why := refusal(kind, q.scheme, q.shape[1])) is not None:
        raise FormatError(why)
    step = max(1, WEIGHTS_AT_ONCE // q.shape[1])
    return np.concatenate([_proved(kind, q.rows(n, n + step)) for n in range(0, q.shape[0], step)])


def _proved(kind: str, q: QuantizedTensor) -> NDArray[np.uint8]:
    stored = _PACKERS[kind](q)
    if not np.array_equal(gguf_blocks.decode(kind, stored), q.dequantize().numpy()):  # +0 and -0 are the same weight
        raise FormatError(f"{kind} would change the weight: {_why(q)}")
    return stored


def nearest(kind: str, weight: Tensor) -> NDArray[np.uint8]:
    """(N, K) float32 -> blocks of one of `NEAREST`, quantized as llama.cpp does it."""
    import gguf

    stored = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(stored).view(np.uint8)


class _Packed:
    """The quantized weights of one export; it records how each of them was stored."""

    def __init__(self, weights: PackedWeights, kind: str, requantize: bool) -> None:
        self._weights, self._kind, self._requantize = weights, kind, requantize
        self.exact: list[str] = []
        self.rounded: dict[str, float] = {}
        self._stored = self._count = 0

    @property
    def bits(self) -> float:
        return self._stored / max(self._count, 1)

    def tensors(self) -> Iterator[Stored]:
        for module in self._weights.modules:
            shape = self._weights.shape(module)
            kind = self._choice(module, shape[1])
            yield Stored(f"{module}.weight", kind, shape, partial(self._read, module, kind))

    def _choice(self, module: str, columns: int) -> str:
        """The type of a weight, chosen by its grid.  Whether the scales fit is checked when it is packed."""
        scheme = self._weights.scheme(module) if self._weights.is_affine(module) else None
        candidates = EXACT if self._kind == AUTO else (self._kind,)
        refusals = [] if scheme is None else [refusal(kind, scheme, columns) for kind in candidates]
        if None in refusals:
            return candidates[refusals.index(None)]
        if not self._requantize:
            why = "it has no integer grid" if scheme is None else "; ".join(filter(None, refusals))
            raise FormatError(f"{module} cannot be stored exactly in a GGUF file: {why}", hint=REMEDY)
        if columns % SMALLEST_BLOCK:
            return "F16"
        if self._kind in NEAREST:
            return self._kind
        return "Q4_0" if scheme is not None and scheme.bits <= 4 else "Q8_0"

    def _read(self, module: str, kind: str) -> NDArray[Any]:
        """The blocks of a weight, or its floats if it becomes F16."""
        try:
            stored: NDArray[Any] = self._exactly(module, kind)
            self.exact.append(f"{module}.weight")
        except FormatError as error:
            if not self._requantize:
                message = f"{module} cannot be stored exactly in a GGUF file: {error}"
                raise FormatError(message, hint=error.hint or REMEDY) from error
            stored = self._rounded(module, kind)
        self._stored += 8 * gguf_blocks.row_bytes(kind, self._weights.shape(module)[1]) * len(stored)
        self._count += math.prod(self._weights.shape(module))
        return stored

    def _exactly(self, module: str, kind: str) -> NDArray[np.uint8]:
        if kind not in EXACT or not self._weights.is_affine(module):
            raise FormatError("it has no integer grid that a type of GGUF can hold")
        return pack(kind, self._weights.read(module))

    def _rounded(self, module: str, kind: str) -> NDArray[Any]:
        weight = self._weights.weight(module)
        raw = self._with_other_scales(module, kind)
        if raw is None and kind not in (*NEAREST, "F16"):
            raise FormatError(
                f"{module} has scales beyond the range of fp16", hint="use kind='Q8_0', which requantizes the weight"
            )
        if raw is None:
            raw = gguf_blocks.pack_float(kind, weight.numpy()) if kind == "F16" else nearest(kind, weight)
        decoded = gguf_blocks.decode(kind, raw)
        if not np.isfinite(decoded).all():
            raise FormatError(f"{module} has weights or scales beyond the range of fp16")
        self.rounded[f"{module}.weight"] = float(np.abs(decoded - weight.numpy()).max())
        return decoded if kind == "F16" else raw

    def _with_other_scales(self, module: str, kind: str) -> NDArray[np.uint8] | None:
        """The same codes with scales rounded to fp16; None where the grid itself does not fit."""
        q = self._weights.read(module) if self._weights.is_affine(module) else None
        if q is None or kind not in EXACT or refusal(kind, q.scheme, q.shape[1]) is not None or not _in_order(q):
            return None
        halves = q.scales.to(torch.float16)
        return pack(kind, dataclasses.replace(q, scales=halves)) if halves.isfinite().all() else None


def _in_order(q: QuantizedTensor) -> bool:
    if q.group_index is None:
        return True
    per_group = q.scheme.columns_per_group(q.shape[1])
    return bool((q.column_groups() == torch.arange(q.shape[1]) // per_group).all())


def _why(q: QuantizedTensor) -> str:
    scales = q.scales.to(torch.float32)
    moved = int((scales.to(torch.float16).to(torch.float32) != scales).sum())
    return f"{moved} of its {scales.numel()} scales are not fp16 numbers" if moved else "its grid is wider"


def _scales(q: QuantizedTensor, weights: int) -> NDArray[np.float16]:
    """(N, K / weights) fp16: the scale of each block."""
    groups = q.column_groups()[::weights]
    scales: NDArray[np.float16] = q.scales.to(torch.float16)[:, groups].numpy()
    return scales


def _centred(q: QuantizedTensor) -> NDArray[np.int16]:
    """(N, K) int16: code - zero."""
    zeros = q.scheme.middle if q.zeros is None else q.zeros[:, q.column_groups()]
    difference: NDArray[np.int16] = (q.codes.to(torch.int16) - zeros).numpy()
    return difference


def _within(centred: NDArray[np.int16], lowest: int, highest: int) -> NDArray[np.int16]:
    """`centred`, checked to fit the type: a damaged file may hold a zero point outside of its grid."""
    if centred.size and (int(centred.min()) < lowest or int(centred.max()) > highest):
        raise FormatError(f"code - zero is {centred.min()} to {centred.max()}, expected {lowest} to {highest}")
    return centred


def _pack_q4_0(q: QuantizedTensor) -> NDArray[np.uint8]:
    return gguf_blocks.pack_q4_0((_within(_centred(q), -8, 7) + 8).astype(np.uint8), _scales(q, 32))


def _pack_q5_0(q: QuantizedTensor) -> NDArray[np.uint8]:
    return gguf_blocks.pack_q5_0((_within(_centred(q), -16, 15) + 16).astype(np.uint8), _scales(q, 32))


def _pack_q8_0(q: QuantizedTensor) -> NDArray[np.uint8]:
    return gguf_blocks.pack_q8_0(_within(_centred(q), -128, 127).astype(np.int8), _scales(q, 32))


def _pack_k(q: QuantizedTensor) -> NDArray[np.uint8]:
    """Q4_K or Q5_K: (d * 1) * code - (d * zero).  Both products are exact in float32."""
    d, groups = _scales(q, gguf_k_quants.WEIGHTS), q.column_groups()[::32]
    zeros = torch.full((1, 1), q.scheme.middle) if q.zeros is None else q.zeros
    m = np.broadcast_to(zeros.expand(q.shape[0], q.scales.shape[1])[:, groups].numpy(), (q.shape[0], len(groups)))
    if m.size and (int(m.min()) < 0 or int(m.max()) > 63):
        raise FormatError(f"its zero points are {m.min()} to {m.max()}, expected 0 to 63")
    sc = np.ones(m.shape, dtype=np.uint8)
    pack_codes = gguf_k_quants.pack_q4_k if q.scheme.bits <= 4 else gguf_k_quants.pack_q5_k
    return pack_codes(q.codes.numpy(), d, d, sc, m.astype(np.uint8))


_PACKERS: dict[str, Callable[[QuantizedTensor], NDArray[np.uint8]]] = {
    "Q4_0": _pack_q4_0,
    "Q4_K": _pack_k,
    "Q5_K": _pack_k,
    "Q5_0": _pack_q5_0,
    "Q8_0": _pack_q8_0,
}
