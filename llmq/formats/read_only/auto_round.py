"""AutoRound's format, read only: the tensors of another layout with a separate configuration.

    packing_format              tensors
    auto_round:auto_gptq        as in `gptq.py`, v1, without g_idx       (also auto_round:gptq, gptq)
    auto_round:auto_awq         as in `awq.py`                           (also auto_round:awq, awq)
    auto_round                  as in `gptq.py`, v2                      (also auto_round:gptqmodel, :exllamav2 …)
    auto_round:llm_compressor   weight_packed, floats of four bits, as in `fp4.py`

`extra_config` holds exceptions: it maps the name of a module, or a pattern that matches anywhere in the name, to the
keys that differ.  16 bits mean that the module is kept in float.  `block_name_to_quantize` lists what is quantized;
llmq does not need it, because the tensors show it.

Source: github.com/intel/auto-round, auto_round/inference/convert_model.py and export/export_to_autoround.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llmq.errors import FormatError
from llmq.formats import awq, compressed_tensors, gptq
from llmq.formats.base import Layout, Readable, Reader, Reading
from llmq.formats.codecs import checks, fp4
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.patterns import Pattern

NAME = "auto-round"
GPTQ, GPTQ_V2, AWQ, FLOAT = "gptq", "gptq_v2", "awq", "llm_compressor"
NOT_READ = ("fake", "mlx", "fp8", "e5m3")
FLOATS = {"nv_fp": (fp4.NVFP4_GROUP, fp4.nvfp4), "mx_fp": (fp4.MXFP4_GROUP, fp4.mxfp4)}  # by the start of data_type
FLOAT_BITS = 16


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Readable.unpack`."""
    return _home(reading).unpack(tensors, dataclasses.replace(reading, packing=""))


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Readable.weight_shape`."""
    return _home(reading).weight_shape(shapes, dataclasses.replace(reading, packing=""), read)


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Readable.read_config`."""
    for key in ("rotation_config", "spinquant_config"):
        if config.get(key):
            raise FormatError(
                f"the checkpoint declares {key}, which rotates inputs at run time; llmq does not support this",
                hint="use a checkpoint without it, or the original model",
            )
    common = _reading(config)
    exceptions = {
        name: _reading({**config, **checks.mapping(overrides, name)})
        for name, overrides in checks.mapping(config.get("extra_config") or {}, "extra_config").items()
    }
    skipped = checks.names_in(config.get("modules_to_not_convert"), "modules_to_not_convert")
    skipped_patterns = [pattern for entry in skipped if (pattern := _pattern(entry)) is not None]
    patterns = [(pattern, exceptions[name]) for name in exceptions if (pattern := _pattern(name)) is not None]

    def read(module: str) -> Reading | None:
        if module in exceptions:
            return exceptions[module]
        if module in skipped or any(pattern.search(module) for pattern in skipped_patterns):
            return None
        return next((reading for pattern, reading in patterns if pattern.search(module)), common)

    return read


def _reading(config: Mapping[str, Any]) -> Reading | None:
    """How modules with these settings are read; None where they are kept in float."""
    bits, group_size = checks.declared(config, "bits"), checks.declared(config, "group_size")
    if isinstance(bits, int) and bits >= FLOAT_BITS:
        return None
    note = "quantized activations" if (config.get("act_bits") or FLOAT_BITS) < FLOAT_BITS else ""
    packing = _packing(config)
    kind = str(config.get("data_type") or "int")
    if packing == FLOAT or not kind.startswith("int"):
        start = next((start for start in FLOATS if kind.startswith(start)), None)
        if start is None or packing != FLOAT or (bits, group_size) != (4, FLOATS[start][0]):
            declared = f"{kind!r} with {bits} bits in groups of {group_size} as {config.get('packing_format')!r}"
            raise FormatError(f"the checkpoint declares weights of type {declared}, which llmq does not read")
        size, decode = FLOATS[start]
        return Reading(WeightScheme(4, size), packing=decode.__name__, decode=decode, note=note)
    symmetric = config.get("sym")
    allowed = (awq.BITS,) if packing == AWQ else gptq.BITS_READ
    grid = checks.declared_grid(bits, group_size, True if symmetric is None else symmetric, allowed)
    return dataclasses.replace(grid, zeros_offset=int(packing == GPTQ), packing=packing, note=note)


def _packing(config: Mapping[str, Any]) -> str:
    """The layout of the tensors."""
    declared = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq").lower()
    if any(word in declared for word in NOT_READ):
        raise FormatError(f"the checkpoint's packing_format is {declared!r}, which llmq does not read")
    if "awq" in declared:
        return AWQ
    if "llm_compressor" in declared:
        return FLOAT
    return GPTQ if declared == "auto" or ("gptq" in declared and "gptqmodel" not in declared) else GPTQ_V2


def _home(reading: Reading) -> Layout:
    """The layout that reads these tensors."""
    if reading.decode is not None:
        return compressed_tensors.LAYOUT
    return awq.LAYOUT if reading.packing == AWQ else gptq.LAYOUT


def _pattern(name: str) -> Pattern | None:
    """`name` as a regular expression; None if it is not a valid one, which AutoRound compares as a plain name."""
    try:
        return Pattern(name)
    except FormatError:
        return None


LAYOUT = Readable(
    name=NAME,
    suffixes=tuple(dict.fromkeys((*gptq.LAYOUT.suffixes, *compressed_tensors.LAYOUT.suffixes))),
    codes=("qweight", "weight_packed"),
    unpack=unpack,
    weight_shape=weight_shape,
    read_config=read_config,
    quant_methods=(NAME, "autoround", "intel/auto-round"),
    implied_by=("autoround_version",),
    own_files=("quantization_config.json",),
    exclusions=("modules_to_not_convert",),
    needs=lambda reading: _home(reading).needs(reading),
    not_applied=compressed_tensors.LAYOUT.not_applied,
)
