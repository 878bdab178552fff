"""compressed-tensors, `pack-quantized`: the layout of vLLM's own tools, and the only one that holds every grid of ours.

    weight_packed      int32 (N, ceil(K * bits / 32))   a row's codes as one stream of bits along K (see bits.py)
    weight_scale       float (N, G)                     the model's dtype
    weight_shape       int64 (2,)                       N, K: the packed width alone does not tell K
    weight_zero_point  int32 (ceil(N * bits / 32), G)   asymmetric only; a stream along N, of the same unsigned numbers
    weight_g_idx       int32 (K,)                       read only: files from before this was dropped

The format speaks of signed codes and zeros, q - 2**(bits - 1), and packs them with 2**(bits - 1) added: which is our
unsigned code and zero as they are.

Also read: 3 bits padded to ten codes a word (older versions), known by the packed width.  Some lengths up to 150, none
a multiple of 32, have the same width in both forms; those are taken as dense.  Zeros as plain int8 (older versions, and
the strategy "tensor", which packs none).  Not covered: sparsity, transforms, activations, float types.

Source: github.com/vllm-project/compressed-tensors, src/compressed_tensors/compressors/pack_quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.config import BITS, Scheme
from llmq.errors import FormatError
from llmq.formats import Reader, Reading, bits, checks
from llmq.quantized import QuantizedTensor

NAME = "compressed-tensors"
SUFFIXES: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
CODES = "weight_packed"
ONE_GRID = False
CONFIG_COPY: str | None = None
PACKING = "pack-quantized"

BLOCKS_NOT_READ = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
INDEXED = ("group", "dynamic", True)  # the values of `actorder` that come with weight_g_idx


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    tensors = {
        "weight_packed": bits.pack(q.codes, q.scheme.bits),
        "weight_scale": q.scales.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64, device=q.codes.device),
    }
    if q.zeros is not None:
        tensors["weight_zero_point"] = bits.pack(q.zeros.to(torch.uint8), q.scheme.bits, dim=0)
    return tensors


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    scheme = reading.scheme
    N, K = (int(size) for size in checks.stored(tensors, "weight_shape", (torch.int64, torch.int32), (2,)))
    packed = checks.stored(tensors, "weight_packed", (torch.int32,), (N, None))
    codes = _unpacked(packed, scheme.bits, K, dim=1, what="weight_packed")
    G = checks.groups_for(scheme, K)
    shape = (1,) if scheme.group_size == "tensor" else (N, G)
    scales = checks.stored(tensors, "weight_scale", checks.SCALE_DTYPES, shape).reshape(-1, G).expand(N, G)
    zeros = _zeros(tensors, scheme, N, G)
    return QuantizedTensor(codes, scales.contiguous(), zeros, scheme, _group_index(tensors, reading, K))


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    rows, columns = read("weight_shape").tolist()
    return int(rows), int(columns)


def refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`: only a group size that does not divide in_features is refused."""
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`."""
    return model_dtype


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.

    Only keys that every version of the format knows, as several readers refuse a group with a key that is new to them.
    """
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in checks.as_stored(schemes).items():
        modules.setdefault(scheme, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(modules) == 1 else targets,
            "weights": _weights_block(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (scheme, targets) in enumerate(modules.items())
    }
    return {
        "quant_method": NAME,
        "format": PACKING,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Layout.read_config`.  A module's own name goes before a pattern, a pattern before its class."""
    for block in BLOCKS_NOT_READ:
        value = config.get(block) or {}
        if value and checks.mapping(value, block).get("format") != "dense":  # which some wrote for "not sparse"
            raise FormatError(f"the checkpoint declares {block} {value!r}, which llmq does not read; expected none")
    targets: dict[str, Reading | None] = {}
    for name, group in checks.mapping(checks.declared(config, "config_groups"), "config_groups").items():
        reading = _group_reading(checks.mapping(group, name), config.get("format"))
        targets |= dict.fromkeys(checks.names_in(group.get("targets"), f"targets of {name}"), reading)
    ignored = checks.names_in(config.get("ignore"), "ignore")
    patterns = [(checks.pattern(target[3:]), targets[target]) for target in sorted(targets) if target.startswith("re:")]
    ignored_patterns = [checks.pattern(entry[3:]) for entry in ignored if entry.startswith("re:")]

    def read(module: str) -> Reading | None:
        if module in ignored or "Linear" in ignored or any(pattern.match(module) for pattern in ignored_patterns):
            return None
        if module in targets:
            return targets[module]
        by_pattern = (reading for pattern, reading in patterns if pattern.match(module))
        return next(by_pattern, targets.get("Linear"))

    return read


def _unpacked(words: Tensor, bits_per_code: int, length: int, dim: int, what: str) -> Tensor:
    """Dense or padded words -> uint8 codes, told apart by their number."""
    found = words.shape[dim]
    dense, padded = bits.words_for(length, bits_per_code), bits.padded_words_for(length, bits_per_code)
    if found == dense:
        return bits.unpack(words, bits_per_code, length, dim)
    if found == padded:
        return bits.unpack_padded(words, bits_per_code, length, dim)
    expected = str(dense) if dense == padded else f"{dense} (or {padded}, padded)"
    raise FormatError(f"{what} has {found} words for {length} codes of {bits_per_code} bits, expected {expected}")


def _zeros(tensors: Mapping[str, Tensor], scheme: Scheme, N: int, G: int) -> Tensor | None:
    """int16 (N, G), or None for a symmetric grid, which may leave them out."""
    zeros = tensors.get("weight_zero_point")
    if zeros is None and scheme.symmetric:
        return None
    if zeros is not None and zeros.dtype == torch.int8:  # signed, one a byte
        shape = (1,) if scheme.group_size == "tensor" else (N, G)
        plain = checks.stored(tensors, "weight_zero_point", (torch.int8,), shape).reshape(-1, G).expand(N, G)
        return checks.zeros_for(scheme, plain.to(torch.int16) + scheme.middle)
    packed = checks.stored(tensors, "weight_zero_point", (torch.int32,), (None, G))
    codes = _unpacked(packed, scheme.bits, N, dim=0, what="weight_zero_point")  # (N, G)
    return checks.zeros_for(scheme, codes.to(torch.int16))


def _group_index(tensors: Mapping[str, Tensor], reading: Reading, K: int) -> Tensor | None:
    if "weight_g_idx" not in tensors and not reading.needs_group_index:
        return None
    index = checks.stored(tensors, "weight_g_idx", (torch.int32,), (K,))
    if bool((index == -1).all()):  # how the format's own tools mark an index that was never set
        return None
    return checks.group_index_for(reading.scheme, index)


def _weights_block(scheme: Scheme) -> dict[str, Any]:
    grouped = isinstance(scheme.group_size, int)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }


def _group_reading(group: Mapping[str, Any], file_format: object) -> Reading | None:
    """One of `config_groups` -> how its modules are read, None if it leaves weights alone."""
    for activations in ("input_activations", "output_activations"):
        if group.get(activations) is not None:
            raise FormatError(
                f"the checkpoint quantizes {activations.replace('_', ' ')}, which llmq does not run",
                hint="llmq reads checkpoints whose weights alone are quantized",
            )
    if group.get("weights") is None:
        return None
    weights = checks.mapping(group["weights"], "weights")
    packing = group.get("format") or file_format
    found = {"format": packing, "type": weights.get("type", "int"), "dynamic": weights.get("dynamic", False)}
    for key, expected in {"format": PACKING, "type": "int", "dynamic": False}.items():
        if found[key] != expected:
            raise FormatError(f"the checkpoint declares weights of {key} {found[key]!r}, expected {expected!r}")
    symmetric = weights.get("symmetric", True)
    scheme = checks.declared_scheme(checks.declared(weights, "num_bits"), _group_size(weights), symmetric, BITS)
    return Reading(scheme, needs_group_index=weights.get("actorder") in INDEXED)


def _group_size(weights: Mapping[str, Any]) -> Any:
    """The strategy may be left to follow from the group size: none is one scale in all, -1 one a row."""
    group_size = weights.get("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = weights.get("strategy") or implied
    if strategy not in ("group", "channel", "tensor"):
        raise FormatError(f"the checkpoint scales weights by {strategy!r}, expected by group, channel or tensor")
    return group_size if strategy == "group" else strategy
