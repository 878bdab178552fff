"""AWQ in its GEMM form: four bits, packed along out_features, in an order that suited its first kernel.

    qweight  int32 (K, N / 8)   word c of row k holds outputs 8c … 8c + 7 of input k
    qzeros   int32 (G, N / 8)   the same of the zeros, stored as they are
    scales   float (G, N)       float16; other writers use the model's dtype

    bit     31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    output    7       5       3       1       6       4      2       0      of the eight in a word

A symmetric grid is written with a zero of 8 everywhere and declared as `zero_point: true`: the file holds zeros either
way, and the fast kernels of serving engines are made for the declared kind alone.

Not covered: the forms gemv, gemv_fast and llm-awq, which pack along K or in int16.

Source: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.config import Scheme
from llmq.errors import ConfigError, FormatError
from llmq.formats import Reader, Reading, bits, checks
from llmq.quantized import QuantizedTensor

NAME = "awq"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales")
CODES = "qweight"
ONE_GRID = True
CONFIG_COPY: str | None = None

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in nibble 0, 1, …
INVERSE = tuple(ORDER.index(output) for output in range(PER_WORD))


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    zeros = torch.full_like(q.scales, q.scheme.middle, dtype=torch.uint8) if q.zeros is None else q.zeros  # (N, G)
    return {
        "qweight": _packed(q.codes),
        "qzeros": _packed(zeros.to(torch.uint8)),
        "scales": q.scales.T.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    scheme = reading.scheme
    qweight = checks.stored(tensors, "qweight", (torch.int32,), (None, None))
    K, N = qweight.shape[0], qweight.shape[1] * PER_WORD
    G = checks.groups_for(scheme, K)
    scales = checks.stored(tensors, "scales", checks.SCALE_DTYPES, (G, N)).T.contiguous()
    zeros = _unpacked(checks.stored(tensors, "qzeros", (torch.int32,), (G, N // PER_WORD))).to(torch.int16)  # (N, G)
    return QuantizedTensor(_unpacked(qweight), scales, checks.zeros_for(scheme, zeros), scheme)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    K, N = shapes["qweight"]
    return N * 32 // reading.scheme.bits, K


def refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if scheme.bits != BITS:
        return f"awq holds 4 bits only, not {scheme.bits}; compressed-tensors holds 2, 3, 4 and 8"
    if out_features % PER_WORD:
        return (
            f"awq packs 8 output features into a word and {out_features} is no multiple of that;"
            " compressed-tensors holds any number"
        )
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: kernels for this layout take float16, whatever the model's dtype."""
    return torch.float16


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.  One grid for all modules."""
    grids = sorted({str(scheme) for scheme in checks.as_stored(schemes).values()})
    if len(grids) > 1:
        raise ConfigError(
            f"an awq file holds one grid for all its modules, found {', '.join(grids)}",
            hint="leave the overrides out, or use --format compressed-tensors",
        )
    for name in unquantized:
        mistaken = next((module for module in schemes if name in module), None)
        if mistaken is not None:
            raise ConfigError(
                f"awq readers would leave {mistaken} out too: its name contains that of {name}, which is to stay",
                hint="use --format compressed-tensors",
            )
    scheme = next(iter(schemes.values()))
    return {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": scheme.group_size if isinstance(scheme.group_size, int) else -1,
        "zero_point": True,
        "version": "gemm",
        "lm_head": any(checks.is_head(name) for name in schemes),
        "modules_to_not_convert": list(unquantized),
    }


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Layout.read_config`.  A module is left out if an entry of the list is any part of its name."""
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise FormatError(f"the awq version is {version!r}, expected 'gemm'")
    symmetric = not config.get("zero_point", True)
    group_size = checks.declared(config, "group_size", "q_group_size")
    scheme = checks.declared_scheme(checks.declared(config, "bits", "w_bit"), group_size, symmetric, (BITS,))
    skipped = checks.names_in(config.get("modules_to_not_convert"), "modules_to_not_convert")

    def read(module: str) -> Reading | None:
        if checks.is_head(module) and not config.get("lm_head"):
            return None
        return None if any(entry in module for entry in skipped) else Reading(scheme)

    return read


def _packed(rows: Tensor) -> Tensor:
    """uint8 (N, columns) -> int32 (columns, N / 8)"""
    return bits.pack(_reordered(rows, ORDER), BITS, dim=0).T.contiguous()


def _unpacked(words: Tensor) -> Tensor:
    """int32 (columns, N / 8) -> uint8 (N, columns)"""
    return _reordered(bits.unpack(words.T, BITS, words.shape[1] * PER_WORD, dim=0), INVERSE)


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """(N, columns) with its rows permuted within every eight: whole rows move, which is far cheaper than nibbles."""
    return rows.reshape(rows.shape[0] // PER_WORD, PER_WORD, rows.shape[1])[:, order].flatten(0, 1)
