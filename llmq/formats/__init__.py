"""On-disk layouts: one file each, found by its file name.

A layout says how a `QuantizedTensor` becomes the named tensors that stand in a checkpoint where `<module>.weight`
stood, and how they become a `QuantizedTensor` again.  All carry the same codes, zeros and scales; they differ in which
dimension the codes are packed along, in the order of the bits, and in what `config.json` has to say about them.

    compressed_tensors.py   weight_packed …   row after row: vLLM, SGLang, transformers
    gptq.py                 qweight …         column after column, packed along in_features: nearly everything
    awq.py                  qweight …         packed along out_features, interleaved: vLLM, SGLang, transformers

Tensors alone do not say everything (is a zero stored as it is or less one?), so reading takes two steps: `read_config`
turns the block `quantization_config` of config.json into a `Reader`, which gives for a module name the `Reading` that
`unpack` needs.  Adding a layout is adding a file with the names of `Layout`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from llmq.config import Scheme
from llmq.errors import ConfigError, FormatError
from llmq.quantized import QuantizedTensor

SHARED = ("bits", "checks")  # what the layouts have in common; every other file of this folder is one


@dataclass(frozen=True)
class Reading:
    """How to read the tensors of one module: its grid, and what the tensors alone do not tell.

    zeros_offset       what was subtracted from every zero before packing: 1 in gptq's first version, else 0
    needs_group_index  the columns are grouped in an order of their own, so the file must hold that order
    """

    scheme: Scheme
    zeros_offset: int = 0
    needs_group_index: bool = False


Reader = Callable[[str], Reading | None]
"""Module name (`model.layers.0.mlp.down_proj`) -> how to read it, or None where the file keeps it unquantized."""


class Layout(Protocol):
    """What every file of this folder provides, as a module."""

    NAME: str  # the `quant_method` of config.json
    SUFFIXES: tuple[str, ...]  # of the tensors that replace `<module>.weight`
    CODES: str  # the one of them whose presence marks a module as quantized
    ONE_GRID: bool  # whether all packed modules of a file must have the same grid
    CONFIG_COPY: str | None  # a file that repeats the block of config.json, for the readers that look there

    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Suffix -> contiguous tensor, scales in the dtype that they have.

        Raises `FormatError` for a tensor that is damaged or that the layout cannot hold; ask `refusal` beforehand.
        """

    def unpack(self, tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
        """The exact inverse of `pack`, except that "tensor" comes back as "channel": that is how it is stored.

        `tensors` is suffix -> tensor; suffixes of others (bias) are left alone.  Raises `FormatError` for a tensor
        that is missing or has a wrong shape or dtype.
        """

    def weight_shape(
        self, shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(N, K) of a weight, from suffix -> shape; `read` gives a small tensor by suffix where shapes do not tell."""

    def refusal(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why the layout cannot hold such a grid for such a weight, and which one can; None where it can."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that readers expect scales in; round to it before choosing codes."""

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
        """The block for config.json: module `name` has the grid `schemes[name]`, `unquantized` stayed float.

        Raises `ConfigError` where one file of this layout cannot hold these grids side by side.
        """

    def read_config(self, config: Mapping[str, Any]) -> Reader:
        """The inverse, for blocks of any writer.  Raises `FormatError` naming what is declared but not supported."""


def names() -> tuple[str, ...]:
    """Every layout, sorted: `awq`, `compressed-tensors`, …"""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in files if name not in SHARED))


def load(name: str) -> Layout:
    """The layout called `name`."""
    if name not in names():
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(names())}")
    return cast(Layout, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def detect(quantization_config: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint, from the block `quantization_config` of its config.json."""
    method = quantization_config.get("quant_method")
    if method not in names():
        raise FormatError(
            f"the checkpoint's quant_method is {method!r}, expected one of {', '.join(names())}",
            hint="start from the unquantized model, or from a checkpoint in one of these formats",
        )
    return load(cast(str, method))
