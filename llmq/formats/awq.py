"""AWQ in its GEMM form: four bits, packed along out_features, in the order that its first kernel needed.

    qweight  int32 (K, N / 8)   word c of row k holds the codes (quantized values) of outputs 8c … 8c + 7 of input k
    qzeros   int32 (G, N / 8)   the zero points, packed in the same way, without an offset
    scales   float (G, N)       float16; other writers use the model's dtype

    bit     31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
    output    7       5       3       1       6       4      2       0      of the eight in a word

A symmetric grid is written with the zero point 8 everywhere and declared as `zero_point: true`: the file holds zero
points in any case, and the fast kernels of serving engines support only files with this declaration.

Other numbers of bits, 2 to 8, are read as GPTQModel writes them: one stream along N, outputs in their natural order.
The forms gemv, gemv_fast and llm-awq are read too (`awq_variants.py`); each of them runs only in the engine that it was
made for.

Source: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py; github.com/ModelCloud/GPTQModel.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import ConfigError, FormatError
from llmq.formats.base import Layout, Reader, Reading
from llmq.formats.codecs import awq_variants, bit_packing, checks
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

NAME = "awq"
BITS = 4
BITS_READ = (2, 3, 4, 5, 6, 7, 8)
GEMM = ("gemm", "exllama", "exllamav2", "ipex")  # the last three are kernels that read the gemm form
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs is in nibble 0, 1, …
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
    if reading.packing:
        return awq_variants.unpack(tensors, reading)
    qweight = checks.stored(tensors, "qweight", (torch.int32,), (None, None))
    N, K = weight_shape({"qweight": tuple(qweight.shape)}, reading, tensors.__getitem__)
    G = checks.groups_of(reading, K)
    scales = checks.stored(tensors, "scales", checks.SCALE_DTYPES, (G, N))
    qzeros = checks.stored(tensors, "qzeros", (torch.int32,), (G, qweight.shape[1]))
    zeros = _unpacked(qzeros, reading.bits).to(torch.int16)  # (N, G)
    return checks.affine(_unpacked(qweight, reading.bits), scales.T, zeros, reading)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    if reading.packing:
        return awq_variants.weight_shape(shapes["qweight"], reading)
    K, words = shapes["qweight"]
    return words * 32 // reading.bits, K


def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if (reason := checks.floats_refusal(scheme, NAME)) is not None:
        return reason
    if scheme.bits != BITS:
        return f"awq holds 4 bits only, not {scheme.bits}; compressed-tensors holds 2 to 8"
    if out_features % PER_WORD:
        return (
            f"awq packs 8 output features into a word and {out_features} is not a multiple of 8;"
            " compressed-tensors holds any number"
        )
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: kernels for this layout need float16, whatever the dtype of the model."""
    return torch.float16


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.  All modules have the same grid."""
    grids = sorted({str(scheme) for scheme in checks.as_stored(schemes).values()})
    if len(grids) > 1:
        raise ConfigError(
            f"an awq file holds one grid for all modules, found {', '.join(grids)}",
            hint="remove the overrides, or use --format compressed-tensors",
        )
    for name in unquantized:
        mistaken = next((module for module in schemes if name in module), None)
        if mistaken is not None:
            raise ConfigError(
                f"awq readers would treat {mistaken} as float: its name contains {name}, which is kept in float",
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
    """See `Layout.read_config`.  A module is kept in float if an entry of the list is any part of its name."""
    group_size = checks.declared(config, "group_size", "q_group_size")
    symmetric = not config.get("zero_point", not config.get("sym", False))
    grid = checks.declared_grid(checks.declared(config, "bits", "w_bit"), group_size, symmetric, BITS_READ)
    grid = dataclasses.replace(grid, packing=_packing(config))
    if grid.packing and grid.bits != BITS:
        raise FormatError(f"the configuration declares {grid.bits} bits in the form {grid.packing}, expected {BITS}")
    skipped = checks.names_in(config.get("modules_to_not_convert"), "modules_to_not_convert")

    def read(module: str) -> Reading | None:
        if checks.is_head(module) and not config.get("lm_head"):
            return None
        return None if any(entry in module for entry in skipped) else grid

    return read


def _packing(config: Mapping[str, Any]) -> str:
    """The form of the tensors; "" is gemm."""
    named = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    version = str(named).lower().replace("-", "_")
    if str(config.get("backend", "")).lower() == "llm-awq" or version == "llm_awq":
        return awq_variants.LLM_AWQ
    if version in GEMM:
        return ""
    if version in (awq_variants.GEMV, awq_variants.GEMV_FAST):
        return version
    raise FormatError(f"the awq version is {named!r}, expected one of gemm, gemv, gemv_fast, llm-awq")


def _packed(rows: Tensor) -> Tensor:
    """uint8 (N, columns) -> int32 (columns, N / 8)"""
    return bit_packing.pack(_reordered(rows, ORDER), BITS, dim=0).T.contiguous()


def _unpacked(words: Tensor, width: int) -> Tensor:
    """int32 (columns, words) -> uint8 (N, columns)"""
    rows = bit_packing.unpack(words.T, width, words.shape[1] * 32 // width, dim=0)
    return _reordered(rows, INVERSE) if width == BITS else rows


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """(N, columns) with rows permuted within every eight; moving whole rows is far cheaper than moving nibbles."""
    return rows.reshape(rows.shape[0] // PER_WORD, PER_WORD, rows.shape[1])[:, order].flatten(0, 1)


LAYOUT = Layout(
    name=NAME,
    suffixes=("qweight", "qzeros", "scales", "scaled_zeros"),
    codes=("qweight",),
    needs=lambda reading: ("qweight", "scales"),
    pack=pack,
    unpack=unpack,
    weight_shape=weight_shape,
    refusal=refusal,
    scale_dtype=scale_dtype,
    quantization_config=quantization_config,
    read_config=read_config,
    quant_methods=("awq", "auto-awq", "awq-marlin", "llm-awq"),
    implied_by=("zero_point", "w_bit"),
    own_files=("quant_config.json",),
    exclusions=("modules_to_not_convert",),
    one_grid=True,
    holds_head=False,  # readers keep the head in 16 bits
)
