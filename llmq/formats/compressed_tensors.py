"""compressed-tensors: the layout of vLLM's tools, and the only format that holds every grid of llmq.

    weight_packed      int32 (N, ceil(K * bits / 32))   a row's codes as one stream of bits along K (`bit_packing.py`)
    weight_scale       float (N, G)                     the model's dtype
    weight_shape       int64 (2,)                       N, K: the packed width alone does not determine K
    weight_zero_point  int32 (ceil(N * bits / 32), G)   asymmetric only; a stream along N, of the same unsigned numbers
    weight_g_idx       int32 (K,)                       read only: written by older versions

This is `pack-quantized`.  Weights of 8 bits with quantized inputs are `int-quantized`: one signed byte per code in
`weight` itself, and no weight_shape (`codecs/ct_groups.py`).

Codes are the quantized values.  The format defines signed codes and zero points, q - 2**(bits - 1), and packs them with
2**(bits - 1) added.  The packed numbers are the unsigned codes and zero points of llmq.

Also read:

* 3 bits padded to ten codes per word (older versions).  The packed width shows which form it is.  Some lengths up to
  150, none a multiple of 32, have the same width in both forms; these are read as dense.
* Zero points as plain int8 (older versions, and the strategy "tensor", which packs none).
* `int-quantized` with float inputs, and `naive-quantized`.
* Floats of four and eight bits (`ct_floats.py`), which are written, too.
* Files that declare other quantized inputs, or a quantized cache: the weights are read, and a note lists the rest.

Not covered: sparsity, transforms, mxfp6 and mxfp8, scales of blocks of integers.

Source: github.com/vllm-project/compressed-tensors, src/compressed_tensors/compressors/pack_quantized.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Layout, QuantizedInputs, Reader, Reading
from llmq.formats.codecs import bit_packing, checks, ct_floats, ct_groups, fp8
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, InputScheme, Scheme, WeightScheme
from llmq.patterns import Pattern

NAME = ct_groups.NAME
PACKING = ct_groups.WORDS
PLAIN = (ct_groups.BYTES, "naive-quantized")

BLOCKS_NOT_READ = ("sparsity_config", "transform_config", "moe_sparsity_config")
NOT_APPLIED = tuple(  # of quantized inputs, outputs and caches
    f"{place}_{kind}"
    for place in ("input", "output", "q", "k", "v")
    for kind in ("scale", "zero_point", "global_scale", "g_idx")
)
INDEXED = ("group", "dynamic", True)  # the values of `actorder` that come with weight_g_idx


def pack(q: QuantizedTensor, packing: str = PACKING) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    if q.scheme.floats is not None:
        return ct_floats.pack(q)
    if packing in PLAIN:
        return ct_groups.pack_bytes(q)
    tensors = {
        "weight_packed": bit_packing.pack(q.codes, q.scheme.bits),
        "weight_scale": q.scales.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64, device=q.codes.device),
    }
    if q.zeros is not None:
        tensors["weight_zero_point"] = bit_packing.pack(q.zeros.to(torch.uint8), q.scheme.bits, dim=0)
    return tensors


def pack_with_inputs(q: QuantizedTensor, inputs: InputScheme, *, as_bytes: bool = False) -> dict[str, Tensor]:
    """See `QuantizedInputs.pack`."""
    packing = ct_groups.packing_of(Scheme(q.scheme, inputs), as_bytes=as_bytes)
    return pack(q, packing) | ct_groups.tensors_of(inputs, q.scales.dtype)


def pack_like(q: QuantizedTensor, reading: Reading) -> dict[str, Tensor]:
    """See `Layout.pack_like`."""
    tensors = pack(q, reading.packing or PACKING)
    return tensors if reading.inputs is None else tensors | ct_groups.tensors_of(reading.inputs, q.scales.dtype)


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    scheme = reading.scheme
    if scheme.floats is not None:
        return ct_floats.unpack(tensors, scheme)
    if reading.packing in PLAIN:
        signed = checks.stored(tensors, "weight", (torch.int8,), (None, None))
        codes = (signed.to(torch.int16) + (1 << (reading.bits - 1))).to(torch.uint8)
    else:
        N, K = (int(size) for size in checks.stored(tensors, "weight_shape", (torch.int64, torch.int32), (2,)))
        packed = checks.stored(tensors, "weight_packed", (torch.int32,), (N, None))
        codes = _unpacked(packed, reading.bits, K, dim=1, suffix="weight_packed")
    N, K = codes.shape
    G = checks.groups_of(reading, K)
    shape = (1,) if scheme.group_size == "tensor" else (N, G)
    scales = _by_row(checks.stored(_reshaped(tensors, shape), "weight_scale", checks.SCALE_DTYPES, shape), N, G)
    index = _group_index(tensors, reading, K)
    return checks.affine(codes, scales, _zeros(tensors, reading, N, G), reading, index)


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    if reading.decode is not None and not reading.in_place:
        N, pairs = shapes["weight_packed"]
        return N, 2 * pairs
    if reading.in_place:
        N, K = shapes["weight"]
        return N, K
    stored = {"weight_shape": read("weight_shape")}
    rows, columns = checks.stored(stored, "weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    return int(rows), int(columns)


def needs(reading: Reading) -> tuple[str, ...]:
    """See `Readable.needs`."""
    scale = ct_groups.needed(reading.inputs)
    if reading.in_place:
        return ("weight", "weight_scale", *scale)
    shape = () if reading.decode is not None else ("weight_shape",)
    return ("weight_packed", "weight_scale", *shape, *scale)


def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`: only groups and blocks that do not divide the weight are refused."""
    return checks.grouping_refusal(scheme, in_features) or ct_floats.refusal(scheme, out_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`."""
    return model_dtype


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.

    It has only keys that every version of the format knows: several readers refuse groups with unknown keys.
    """
    return ct_groups.quantization_config({name: Scheme(scheme) for name, scheme in schemes.items()}, unquantized)


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Layout.read_config`.  The name of a module has priority over a pattern, and a pattern over its class.

    A packed module that matches no target has the grid of the file, if there is only one.
    """
    for block in BLOCKS_NOT_READ:
        value = config.get(block) or {}
        if value and checks.mapping(value, block).get("format") != "dense":  # "dense" means not sparse
            raise FormatError(f"the checkpoint declares {block} {value!r}, which llmq does not read; expected none")
    note = "a quantized cache of keys and values" if config.get("kv_cache_scheme") else ""
    targets: dict[str, Reading | None] = {}
    groups: list[Reading | None] = []
    for name, group in checks.mapping(checks.declared(config, "config_groups"), "config_groups").items():
        groups.append(_group_reading(checks.mapping(group, name), config.get("format"), note))
        targets |= dict.fromkeys(checks.names_in(group.get("targets"), f"targets of {name}"), groups[-1])
    common = targets.get("Linear", groups[0] if len(groups) == 1 else None)
    ignored = checks.names_in(config.get("ignore"), "ignore")
    patterns = [(Pattern(target[3:]), targets[target]) for target in sorted(targets) if target.startswith("re:")]
    ignored_patterns = [Pattern(entry[3:]) for entry in ignored if entry.startswith("re:")]

    def read(module: str) -> Reading | None:
        if module in ignored or "Linear" in ignored or any(pattern.match(module) for pattern in ignored_patterns):
            return None
        if module in targets:
            return targets[module]
        by_pattern = (reading for pattern, reading in patterns if pattern.match(module))
        return next(by_pattern, common)

    return read


def _unpacked(words: Tensor, bits_per_code: int, length: int, dim: int, suffix: str) -> Tensor:
    """Dense or padded words -> uint8 codes; the number of words shows which form it is."""
    stored = words.shape[dim]
    dense, padded = bit_packing.words_for(length, bits_per_code), bit_packing.padded_words_for(length, bits_per_code)
    if stored == dense:
        return bit_packing.unpack(words, bits_per_code, length, dim)
    if stored == padded:
        return bit_packing.unpack_padded(words, bits_per_code, length, dim)
    expected = str(dense) if dense == padded else f"{dense} (or {padded}, padded)"
    raise FormatError(f"{suffix} has {stored} words for {length} codes of {bits_per_code} bits, expected {expected}")


def _reshaped(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Mapping[str, Tensor]:
    """`tensors` with the scales in the expected shape, where only dimensions of size 1 differ."""
    scale = tensors.get("weight_scale")
    if scale is None or [size for size in scale.shape if size != 1] != [size for size in shape if size != 1]:
        return tensors
    return {**tensors, "weight_scale": scale.reshape(shape)}


def _by_row(parts: Tensor, N: int, G: int) -> Tensor:
    """(N, G), or (1,) for the whole weight -> (N, G)"""
    return parts.reshape(-1, G).expand(N, G)


def _zeros(tensors: Mapping[str, Tensor], reading: Reading, N: int, G: int) -> Tensor | None:
    """Zero points, int16 (N, G), or None for a symmetric grid, which may omit them."""
    zeros, middle = tensors.get("weight_zero_point"), 1 << (reading.bits - 1)
    if zeros is None and reading.symmetric:
        return None
    if zeros is not None and zeros.dtype == torch.int8:  # signed, one per byte
        shape = (1,) if reading.scheme.group_size == "tensor" else (N, G)
        signed = zeros.reshape(shape) if zeros.numel() == math.prod(shape) else zeros
        plain = checks.stored({"weight_zero_point": signed}, "weight_zero_point", (torch.int8,), shape)
        return _by_row(plain, N, G).to(torch.int16) + middle
    packed = checks.stored(tensors, "weight_zero_point", (torch.int32,), (None, G))
    return _unpacked(packed, reading.bits, N, dim=0, suffix="weight_zero_point").to(torch.int16)  # (N, G)


def _group_index(tensors: Mapping[str, Tensor], reading: Reading, K: int) -> Tensor | None:
    if "weight_g_idx" not in tensors and not reading.needs_group_index:
        return None
    index = checks.stored(tensors, "weight_g_idx", (torch.int32, torch.int64), (K,))
    if bool((index == -1).all()):  # the tools of the format mark an unset index in this way
        return None
    return checks.group_index_for(reading, index, K)


def _group_reading(group: Mapping[str, Any], file_format: object, note: str) -> Reading | None:
    """One of `config_groups` -> how its modules are read; None if it does not quantize weights."""
    if group.get("weights") is None:
        return None
    weights = checks.mapping(group["weights"], "weights")
    packing = group.get("format") or file_format
    if packing == "naive-quantized" and weights.get("type") == "float":
        packing = fp8.PACKING
    inputs = ct_groups.read_inputs(group["input_activations"], packing) if group.get("input_activations") else None
    ignored = (inputs is None and group.get("input_activations")) or group.get("output_activations")
    notes = ", ".join(part for part in ("quantized activations" if ignored else "", note) if part)
    if isinstance(packing, str) and packing in ct_floats.PACKINGS:
        return dataclasses.replace(ct_floats.reading(packing, weights, notes), inputs=inputs)
    if packing not in (PACKING, *PLAIN):
        expected = ", ".join((PACKING, *PLAIN, *ct_floats.PACKINGS))
        raise FormatError(f"the checkpoint declares weights of format {packing!r}, expected one of {expected}")
    for key, default in {"type": "int", "dynamic": False}.items():
        if weights.get(key, default) != default:
            raise FormatError(f"the checkpoint declares weights with {key} {weights[key]!r}, expected {default!r}")
    grid = checks.declared_grid(
        checks.declared(weights, "num_bits"), _group_size(weights), weights.get("symmetric", True), BITS
    )
    return dataclasses.replace(
        grid,
        needs_group_index=weights.get("actorder") in INDEXED,
        packing="" if packing == PACKING else packing,
        in_place=packing in PLAIN,
        inputs=inputs,
        note=notes,
    )


def _group_size(weights: Mapping[str, Any]) -> Any:
    """The group size in the terms of llmq.

    Without a strategy the group size implies one: none means one scale per tensor, -1 means one scale per row.
    """
    group_size = weights.get("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = weights.get("strategy") or implied
    if strategy not in ("group", "channel", "tensor"):
        raise FormatError(f"the checkpoint declares scales per {strategy!r}, expected per group, channel or tensor")
    return group_size if strategy == "group" else strategy


LAYOUT = Layout(
    name=NAME,
    suffixes=(
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        ct_groups.SCALE,
        ct_groups.GLOBAL,
    ),
    codes=("weight_scale",),  # what all packings have
    pack=pack,
    unpack=unpack,
    weight_shape=weight_shape,
    refusal=refusal,
    scale_dtype=scale_dtype,
    quantization_config=quantization_config,
    read_config=read_config,
    quant_methods=(NAME,),
    implied_by=("config_groups",),
    own_keys=("compression_config",),
    exclusions=("ignore",),
    needs=needs,
    not_applied=NOT_APPLIED,
    any_scale_dtype=True,
    pack_like=pack_like,
    with_inputs=QuantizedInputs(
        refusal=ct_groups.refusal,
        pack=pack_with_inputs,
        scale=ct_groups.stored_scale,
        quantization_config=ct_groups.quantization_config,
    ),
)
