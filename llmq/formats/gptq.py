"""GPTQ, as AutoGPTQ introduced it and GPTQModel develops it: the layout that most programs read.

    qweight  int32 (K * bits / 32, N)   word r of column n holds inputs r*P … r*P + P - 1, P = 32 / bits, lowest first
    qzeros   int32 (G, N * bits / 32)   zero points, packed along N in the same way
    scales   float (G, N)               float16; other writers use bfloat16, float32 and negative values too
    g_idx    int32 (K,)                 the group of each input; k // group size in every file that llmq writes

The packed numbers in qweight are the codes (quantized values).  There are two versions, which differ only in qzeros.
v1 (`gptq`) stores each zero point minus one, v2 (`gptq_v2`) stores it unchanged.  v1 subtracts from the whole *word*,
so a zero point of 0 borrows from its neighbour, and only an addition to the whole word restores it.  Readers that add
one to each number separately get such words wrong.  Hence llmq writes symmetric grids as v1, which all programs read,
and asymmetric grids as v2, which all readers interpret in the same way.

Files of other writers are read with 2 to 8 bits:

* 3 bits are one stream through the words (`bit_packing.py`).  There v1 subtracts one from each number separately,
  modulo 8, because a constant added to words would be wrong for numbers that cross words.
* 5, 6 and 7 bits are in planes (`bit_packing.unpack_planes`), but one stream in files of AutoRound.
* GPTQModel's variant `gptq_p` stores 3 bits in planes too, and zero points unchanged.
* The last group of a row may be incomplete, and columns may be grouped in activation order (`desc_act`).  Both are read
  but never written, because engines dropped them.

Not covered: the variants marlin and bitblas, and words of other sizes than 32 bits.

Source: github.com/ModelCloud/GPTQModel, gptqmodel/utils/model.py and nn_modules/qlinear.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import ConfigError, FormatError
from llmq.formats.base import Layout, Reader, Reading
from llmq.formats.codecs import bit_packing, checks
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.patterns import Pattern

NAME = "gptq"
COPY = "quantize_config.json"
BITS_WRITTEN = (4, 8)
BITS_READ = (2, 3, 4, 5, 6, 7, 8)
WHOLE_IN_WORDS = (2, 4, 8)  # numbers of these sizes never cross words
PLANAR = "gptq_p"
VERSIONS = {"gptq": 1, "gptq_v2": 0, PLANAR: 0}  # checkpoint_format -> what is subtracted from a zero point
OTHER_NAMES = {"gemm": "gptq", "exllama": "gptq", "exllamav2": "gptq"}  # of kernels that read v1, in older files


def pack(q: QuantizedTensor, version: str | None = None) -> dict[str, Tensor]:
    """See `Layout.pack`.  In `version`, or else v1 for symmetric and v2 for asymmetric grids."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    scheme = q.scheme
    zeros = torch.full_like(q.scales, scheme.middle, dtype=torch.uint8) if q.zeros is None else q.zeros  # (N, G)
    words = bit_packing.pack(zeros.to(torch.uint8), scheme.bits, dim=0).T  # (G, N * bits / 32)
    return {
        "qweight": bit_packing.pack(q.codes, scheme.bits).T.contiguous(),
        "qzeros": _shifted(words, scheme.bits, -VERSIONS[version or _version(scheme)]).contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": checks.plain_index(scheme, q.shape[1], q.codes.device),
    }


def pack_like(q: QuantizedTensor, reading: Reading) -> dict[str, Tensor]:
    """See `Layout.pack_like`: it uses the version of the file."""
    return pack(q, version="gptq" if reading.zeros_offset else "gptq_v2")


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    qweight = checks.stored(tensors, "qweight", (torch.int32,), (None, None))
    N, K = weight_shape({"qweight": tuple(qweight.shape)}, reading, tensors.__getitem__)
    G = checks.groups_of(reading, K, cut=True)
    scales = checks.stored(tensors, "scales", checks.SCALE_DTYPES, (G, N))
    words = checks.stored(tensors, "qzeros", (torch.int32,), (G, bit_packing.words_for(N, reading.bits)))
    index = None
    if "g_idx" in tensors or reading.needs_group_index:
        index = checks.stored(tensors, "g_idx", (torch.int32, torch.int64), (K,))
    index = checks.group_index_for(reading, index, K)
    codes = _unpacked(qweight.T, reading, K)  # (N, K)
    return checks.affine(codes, scales.T, _zeros(words, reading, N), reading, index)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    rows, N = shapes["qweight"]
    if rows * 32 % reading.bits:
        raise FormatError(
            f"qweight has {rows} rows of words, expected a multiple of {reading.bits} at {reading.bits} bits"
        )
    return N, rows * 32 // reading.bits


def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if (reason := checks.floats_refusal(scheme, NAME)) is not None:
        return reason
    if scheme.bits not in BITS_WRITTEN:
        return f"gptq is written with 4 and 8 bits only, not {scheme.bits}; compressed-tensors holds 2 to 8"
    per_word = 32 // scheme.bits
    for side, features in (("output", out_features), ("input", in_features)):
        if features % per_word:
            return (
                f"gptq packs {per_word} {side} features into a word at {scheme.bits} bits and {features} is not a"
                f" multiple of {per_word}; compressed-tensors holds any number"
            )
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: kernels for this layout need float16, whatever the dtype of the model."""
    return torch.float16


def quantization_config(
    schemes: Mapping[str, WeightScheme], unquantized: Sequence[str], version: str | None = None
) -> dict[str, Any]:
    """See `Layout.quantization_config`.  The most common grid is declared for all; `dynamic` lists the exceptions."""
    stored = checks.as_stored(schemes)
    versions = {version or _version(scheme) for scheme in stored.values()}
    if len(versions) > 1:
        raise ConfigError(
            "a gptq file has one version of zero points, so it cannot hold symmetric and asymmetric grids together",
            hint="use --format gptq_v2, which holds both, or compressed-tensors",
        )
    common = Counter(stored.values()).most_common(1)[0][0]
    head = any(checks.is_head(name) for name in stored)
    excluded = [name for name in unquantized if head or not checks.is_head(name)]  # the key `lm_head` declares the head
    dynamic: dict[str, dict[str, Any]] = {f"-:{_exactly(name)}": {} for name in excluded}
    dynamic |= {f"+:{_exactly(name)}": _grid(scheme) for name, scheme in stored.items() if scheme != common}
    config = {
        "quant_method": NAME,
        **_grid(common),
        "desc_act": False,
        "checkpoint_format": versions.pop(),
        "pack_dtype": "int32",
        "lm_head": head,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Layout.read_config`.  The first pattern in `dynamic` that matches the name of a module decides."""
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    version = OTHER_NAMES.get(version, version)
    pack_dtype = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if version not in VERSIONS:
        raise FormatError(f"checkpoint_format is {version!r}, expected {' or '.join(VERSIONS)}")
    if pack_dtype != "int32":
        raise FormatError(f"pack_dtype is {pack_dtype!r}, expected 'int32'")
    common = _reading(config, version)
    rules: list[tuple[Pattern, Reading | None]] = []
    for key, overrides in checks.mapping(config.get("dynamic") or {}, "dynamic").items():
        settings = None if key.startswith("-:") else {**config, **checks.mapping(overrides, key)}
        rule = Pattern(key.removeprefix("-:").removeprefix("+:"))
        rules.append((rule, None if settings is None else _reading(settings, version)))
    listed = _flat(config.get("modules_in_block_to_quantize") or ())

    def read(module: str) -> Reading | None:
        if checks.is_head(module) and not config.get("lm_head"):
            return None
        if listed and not checks.is_head(module) and not any(f".{module}".endswith(f".{name}") for name in listed):
            return None
        return next((reading for pattern, reading in rules if pattern.match(module)), common)

    return read


def _unpacked(words: Tensor, reading: Reading, length: int) -> Tensor:
    """int32 (…, words) -> uint8 (…, length)"""
    unpack_words = bit_packing.unpack_planes if reading.packing == PLANAR else bit_packing.unpack
    return unpack_words(words, reading.bits, length)


def _zeros(words: Tensor, reading: Reading, N: int) -> Tensor | None:
    """Zero points: int32 (G, words) -> int16 (N, G), or None where the grid is symmetric and all are in the middle."""
    width, middle = reading.bits, 1 << (reading.bits - 1)
    stored = _unpacked(words, reading, words.shape[1] * 32 // width)[:, :N]  # (G, N)
    # some files declare one version and store zero points of the other; in a symmetric grid both mean the middle
    if reading.symmetric and any(bool((stored == middle - offset).all()) for offset in (0, 1)):
        return None
    if width in WHOLE_IN_WORDS:
        whole = _shifted(words, width, reading.zeros_offset)
        return _unpacked(whole, reading, words.shape[1] * 32 // width)[:, :N].T.to(torch.int16)
    return (stored.T.to(torch.int16) + reading.zeros_offset) % (1 << width)


def _shifted(words: Tensor, width: int, amount: int) -> Tensor:
    """int32 words with `amount` added to each packed number, as one sum modulo 2**32: carries cross the numbers."""
    ones = 0xFFFFFFFF // ((1 << width) - 1)  # 0x11111111 at 4 bits
    return (words.to(torch.int64) + amount * ones).to(torch.int32)  # the conversion drops the bits above 32


def _version(scheme: WeightScheme) -> str:
    return "gptq" if scheme.symmetric else "gptq_v2"


def _grid(scheme: WeightScheme) -> dict[str, Any]:
    group_size = scheme.group_size if isinstance(scheme.group_size, int) else -1
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _reading(config: Mapping[str, Any], version: str) -> Reading:
    """How to read modules with these settings."""
    symmetric = config.get("sym")
    grid = checks.declared_grid(
        checks.declared(config, "bits"),
        checks.declared(config, "group_size"),
        True if symmetric is None else symmetric,
        BITS_READ,
    )
    return dataclasses.replace(
        grid,
        zeros_offset=VERSIONS[version],
        needs_group_index=bool(config.get("desc_act", False)),
        packing=PLANAR if version == PLANAR or (grid.bits in (5, 6, 7) and "autoround_version" not in config) else "",
    )


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"


def _flat(entries: Sequence[Any]) -> Sequence[str]:
    """[[a, b], [c]] or [a, b, c] -> [a, b, c]"""
    flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return checks.names_in(flat, "modules_in_block_to_quantize")


LAYOUT = Layout(
    name=NAME,
    suffixes=("qweight", "qzeros", "scales", "g_idx"),
    codes=("qweight",),
    needs=lambda reading: ("qweight", "scales"),
    pack=pack,
    pack_like=pack_like,
    unpack=unpack,
    weight_shape=weight_shape,
    refusal=refusal,
    scale_dtype=scale_dtype,
    quantization_config=quantization_config,
    read_config=read_config,
    quant_methods=("gptq", "auto-gptq", "gptq-marlin", "gptqmodel"),
    implied_by=("desc_act",),
    own_files=(COPY,),
    exclusions=("modules_in_block_to_quantize",),
    config_copy=COPY,
)
