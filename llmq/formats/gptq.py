"""GPTQ, as AutoGPTQ began it and GPTQModel goes on: the layout that most programs read.

    qweight  int32 (K * bits / 32, N)   word r of column n holds inputs r*P … r*P + P - 1, P = 32 / bits, lowest first
    qzeros   int32 (G, N * bits / 32)   zeros, packed along N in the same way
    scales   float (G, N)               float16; other writers use bfloat16, float32 and negative values too
    g_idx    int32 (K,)                 the group of each input; k // group size in every file of ours

Two versions differ in qzeros alone.  v1 (`gptq`) stores zeros less one, v2 (`gptq_v2`) as they are.  The one is
subtracted from the whole *word*, so a zero of 0 borrows from its neighbour, and only adding to the whole word undoes
that; readers that add one to each number by itself are off there.  Hence symmetric grids are written as v1, which all
read, and asymmetric ones as v2, where every zero means itself to everybody.

4 and 8 bits are written, 2 read as well.  Not covered: 3 bits (the constant that turns v1 into v2 zeros differs between
writers there), the variants marlin and bitblas, and writing an order of columns (`desc_act`), which engines dropped.

Source: github.com/ModelCloud/GPTQModel, gptqmodel/utils/model.py and nn_modules/qlinear.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.config import Scheme
from llmq.errors import ConfigError, FormatError
from llmq.formats import Reader, Reading, bits, checks
from llmq.quantized import QuantizedTensor

NAME = "gptq"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
CODES = "qweight"
ONE_GRID = False
CONFIG_COPY: str | None = "quantize_config.json"

BITS_WRITTEN = (4, 8)
BITS_READ = (2, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is subtracted from a zero


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`.  Symmetric is v1, asymmetric v2, as `quantization_config` declares."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    scheme = q.scheme
    zeros = torch.full_like(q.scales, scheme.middle, dtype=torch.uint8) if q.zeros is None else q.zeros  # (N, G)
    words = bits.pack(zeros.to(torch.uint8), scheme.bits, dim=0).T  # (G, N * bits / 32)
    return {
        "qweight": bits.pack(q.codes, scheme.bits).T.contiguous(),
        "qzeros": _shifted(words, scheme, -VERSIONS[_version(scheme)]).contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": checks.plain_index(scheme, q.shape[1], q.codes.device),
    }


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    scheme, per_word = reading.scheme, 32 // reading.scheme.bits
    qweight = checks.stored(tensors, "qweight", (torch.int32,), (None, None))
    K, N = qweight.shape[0] * per_word, qweight.shape[1]
    if N % per_word:
        raise FormatError(f"qweight has {N} columns, expected a multiple of {per_word} at {scheme.bits} bits")
    G = checks.groups_for(scheme, K)
    scales = checks.stored(tensors, "scales", checks.SCALE_DTYPES, (G, N))
    words = checks.stored(tensors, "qzeros", (torch.int32,), (G, N // per_word))
    index = None
    if "g_idx" in tensors or reading.needs_group_index:
        index = checks.group_index_for(scheme, checks.stored(tensors, "g_idx", (torch.int32,), (K,)))
    codes = bits.unpack(qweight.T, scheme.bits, K)  # (N, K)
    return QuantizedTensor(codes, scales.T.contiguous(), _zeros(words, reading), scheme, index)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    K, N = shapes["qweight"]
    return N, K * 32 // reading.scheme.bits


def refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if scheme.bits not in BITS_WRITTEN:
        return f"gptq is written with 4 and 8 bits only, not {scheme.bits}; compressed-tensors holds 2, 3, 4 and 8"
    per_word = 32 // scheme.bits
    for what, features in (("output", out_features), ("input", in_features)):
        if features % per_word:
            return (
                f"gptq packs {per_word} {what} features into a word at {scheme.bits} bits and {features} is no multiple"
                " of that; compressed-tensors holds any number"
            )
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: kernels for this layout take float16, whatever the model's dtype."""
    return torch.float16


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.  The commonest grid is the file's; the key `dynamic` holds the exceptions."""
    stored = checks.as_stored(schemes)
    versions = {_version(scheme) for scheme in stored.values()}
    if len(versions) > 1:
        raise ConfigError(
            "a gptq file stores its zeros in one way, so it cannot hold symmetric and asymmetric grids together",
            hint="make all modules symmetric or all asymmetric, or use --format compressed-tensors",
        )
    common = Counter(stored.values()).most_common(1)[0][0]
    head = any(checks.is_head(name) for name in stored)
    excluded = [name for name in unquantized if head or not checks.is_head(name)]  # `lm_head` tells of the head
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
    """See `Layout.read_config`.  Of the patterns in `dynamic` the first that matches a module's name decides."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    pack_dtype = config.get("pack_dtype") or "int32"
    if version not in VERSIONS:
        raise FormatError(f"checkpoint_format is {version!r}, expected {' or '.join(VERSIONS)}")
    if pack_dtype != "int32":
        raise FormatError(f"pack_dtype is {pack_dtype!r}, expected 'int32'")
    common = _reading(config, VERSIONS[version])
    rules: list[tuple[re.Pattern[str], Reading | None]] = []
    for key, overrides in checks.mapping(config.get("dynamic") or {}, "dynamic").items():
        own = None if key.startswith("-:") else {**config, **checks.mapping(overrides, key)}
        rule = checks.pattern(key.removeprefix("-:").removeprefix("+:"))
        rules.append((rule, None if own is None else _reading(own, VERSIONS[version])))
    listed = _flat(config.get("modules_in_block_to_quantize") or ())

    def read(module: str) -> Reading | None:
        if checks.is_head(module) and not config.get("lm_head"):
            return None
        if listed and not checks.is_head(module) and not any(f".{module}".endswith(f".{name}") for name in listed):
            return None
        return next((reading for pattern, reading in rules if pattern.match(module)), common)

    return read


def _zeros(words: Tensor, reading: Reading) -> Tensor | None:
    """int32 (G, N * bits / 32) -> int16 (N, G), or None for a symmetric grid."""
    scheme, per_word = reading.scheme, 32 // reading.scheme.bits
    if scheme.symmetric:  # some files hold the other version's zeros than they declare; here both mean the middle
        nothing = torch.zeros_like(words)
        if any(torch.equal(words, _shifted(nothing, scheme, scheme.middle - offset)) for offset in VERSIONS.values()):
            return None
    whole = _shifted(words, scheme, reading.zeros_offset)
    zeros = bits.unpack(whole, scheme.bits, words.shape[1] * per_word).T.to(torch.int16)  # (N, G)
    return checks.zeros_for(scheme, zeros.contiguous())


def _shifted(words: Tensor, scheme: Scheme, amount: int) -> Tensor:
    """int32 words plus `amount` in each of their numbers, as one sum modulo 2**32: carries cross the numbers."""
    ones = 0xFFFFFFFF // scheme.levels  # 0x11111111 at 4 bits
    return (words.to(torch.int64) + amount * ones).to(torch.int32)  # the conversion drops all above 32 bits


def _version(scheme: Scheme) -> str:
    return "gptq" if scheme.symmetric else "gptq_v2"


def _grid(scheme: Scheme) -> dict[str, Any]:
    group_size = scheme.group_size if isinstance(scheme.group_size, int) else -1
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _reading(config: Mapping[str, Any], offset: int) -> Reading:
    grid = checks.declared(config, "bits"), checks.declared(config, "group_size"), config.get("sym", True)
    return Reading(checks.declared_scheme(*grid, BITS_READ), offset, bool(config.get("desc_act", False)))


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"


def _flat(entries: Sequence[Any]) -> Sequence[str]:
    """[[a, b], [c]] or [a, b, c] -> [a, b, c]"""
    flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return checks.names_in(flat, "modules_in_block_to_quantize")
