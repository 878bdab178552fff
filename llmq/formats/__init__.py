"""Formats: how a quantized weight is stored in a checkpoint.  One file per format, found by its file name.

A format turns a `QuantizedTensor` into the named tensors that replace `<module>.weight` in a checkpoint, and back.  All
formats hold the same codes (the quantized values), zero points and scales.  They differ in the dimension along which
codes are packed, in the order of the bits, and in the settings in `config.json`.

    base.py                 what a format is: `Layout`, `Readable`, `Reading`
    compressed_tensors.py   weight_packed …   packed row by row: vLLM, SGLang, transformers
    int_quantized.py        weight …          as compressed_tensors.py, with bytes: layers with quantized inputs
    gptq.py                 qweight …         packed along in_features: nearly everything
    gptq_v2.py              qweight …         as gptq.py, but zero points are stored without an offset
    awq.py                  qweight …         packed along out_features, interleaved: vLLM, SGLang, transformers
    mlx.py                  weight, scales …  packed row by row, with offsets in float: mlx-lm
    gguf.py                 gguf_q4_k …       the blocks of a .gguf file, while its run is not finished
    foreign.py              what llmq does not read: other tools, and what their users can do
    read_only/              formats that llmq reads and does not write
    codecs/                 code that several formats share: packing of bits, block types, checks

The tensors alone do not determine a weight.  (Is a zero point stored with an offset of one or not?)  So reading takes
two steps: `read_config` turns the block `quantization_config` of config.json into a function that returns, for a module
name, the `Reading` that `unpack` needs.

Nothing here imports torch until a format is loaded, so that `llmq --help` can list the names.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmq.errors import ConfigError, FormatError
from llmq.formats import foreign as foreign_formats
from llmq.formats import read_only

if TYPE_CHECKING:
    from llmq.formats.base import Layout, Readable

NO_FORMATS = ("base", "foreign")


def names() -> tuple[str, ...]:
    """The names of all formats that can be written, sorted: `awq`, `compressed-tensors`, …"""
    return tuple(sorted(_files()))


def load(name: str) -> "Layout":
    """The format called `name`, one of those that can be written."""
    files = _files()
    if name not in files:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(sorted(files))}")
    layout: Layout = importlib.import_module(f"{__name__}.{files[name]}").LAYOUT
    return layout


def readable() -> "list[Readable]":
    """All formats that a checkpoint can have, also those that llmq only reads."""
    return list(_readable())


def detect(quantization_config: Mapping[str, Any]) -> "Readable":
    """The format of a checkpoint, from the block `quantization_config` of its config.json."""
    layouts = readable()
    method = quantization_config.get("quant_method")
    plain = method.lower().replace("_", "-") if isinstance(method, str) else None
    for layout in layouts:
        implied = method is None and any(key in quantization_config for key in layout.implied_by)
        if implied or plain in layout.quant_methods:
            return layout
    known = ", ".join(layout.name for layout in layouts)
    foreign = foreign_formats.of_block(quantization_config)
    named = f"{method!r} ({foreign.name})" if foreign else repr(method)
    raise FormatError(
        f"the checkpoint's quant_method is {named}, expected one of {known}",
        hint=foreign.way_out if foreign else "start from the unquantized model, or from one of these formats",
    )


def with_settings(config: Mapping[str, Any], layout: "Layout | None", settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with the `settings` of this format in the place of those of any other; None: without.

    config  the content of config.json, of a model in any format
    """
    own = {"quantization_config", *(key for known in readable() for key in known.own_keys)}
    kept = {key: value for key, value in config.items() if key not in own}
    return kept if layout is None else {**kept, **dict.fromkeys(layout.config_keys, settings)}


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json without a quantization, also in its part about the language model."""
    plain = with_settings(config, None, {})
    if isinstance(inner := config.get("text_config"), dict):
        plain["text_config"] = with_settings(inner, None, {})
    return plain


def tensor_name(module: str, suffix: str) -> str:
    """`a.b`, `qweight` -> `a.b.qweight`.  A suffix that starts with an underscore continues the name: `a.b_blocks`"""
    return module + suffix if suffix.startswith("_") else f"{module}.{suffix}"


@functools.cache
def _readable() -> "tuple[Readable, ...]":
    modules = pkgutil.iter_modules(read_only.__path__, f"{read_only.__name__}.")
    only_read: list[Readable] = [importlib.import_module(module.name).LAYOUT for module in modules]
    layouts = [*only_read, *(load(name) for name in names())]
    return tuple(sorted((layout for layout in layouts if layout.quant_methods), key=lambda layout: layout.name))


@functools.cache
def _files() -> dict[str, str]:
    """Name -> file of all formats that can be written: compressed-tensors -> compressed_tensors, gptq_v2 -> gptq_v2.

    An underscore in a file name stands for a hyphen, unless a version follows.
    """
    files = [
        module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg and module.name not in NO_FORMATS
    ]
    return {re.sub(r"_(?!v\d)", "-", file): file for file in files}
