"""On-disk layouts: one file each, found by its file name.

A layout says how a `QuantizedTensor` becomes the named tensors that stand in a checkpoint where `<module>.weight`
stood, and how they become a `QuantizedTensor` again.  All carry the same codes, zeros and scales; they differ in which
dimension the codes are packed along, in the order of the bits, and in what `config.json` has to say about them.

    compressed_tensors.py   weight_packed …   row after row: vLLM, SGLang, transformers
    gptq.py                 qweight …         column after column, packed along in_features: nearly everything
    gptq_v2.py              qweight …         the same with every zero stored as it is
    awq.py                  qweight …         packed along out_features, interleaved: vLLM, SGLang, transformers

    auto_round.py           read only: the tensors of gptq, awq or compressed-tensors under a configuration of its own
    mxfp4.py                read only: the experts of gpt-oss as they were published
    gguf.py                 staged only: the blocks of a .gguf file in the making

Tensors alone do not say everything (is a zero stored as it is or less one?), so reading takes two steps: `read_config`
turns the block `quantization_config` of config.json into a `Reader`, which gives for a module name the `Reading` that
`unpack` needs.  Adding a layout is adding a file with the names of `Layout`, or of `Readable` where it is not written.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from llmq.errors import ConfigError, FormatError
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GROUP_SIZES, GroupSize, WeightScheme

# What layouts have in common; every other file here is one.
SHARED = ("awq_variants", "bit_packing", "checks", "fp4", "gguf_blocks", "gguf_k_quants", "layer_plan")
READ_ONLY = ("auto-round", "mxfp4")
STAGED_ONLY = ("gguf",)  # no checkpoint has it
ALIASES = {  # what else a checkpoint may say for its quant_method
    "auto-awq": "awq",
    "auto-gptq": "gptq",
    "autoround": "auto-round",
    "awq-marlin": "awq",
    "gptq-marlin": "gptq",
    "intel/auto-round": "auto-round",
}


@dataclass(frozen=True)
class Reading:
    """How to read the tensors of one module: its grid, and what the tensors alone do not tell.

    scheme             the grid that `unpack` gives, but for groups cut off at the end of a row.  Codes of 5, 6 and 7
                       bits come back on a grid of 8 bits that has zeros, which is the same weight
    zeros_offset       what was subtracted from every zero before packing: 1 in gptq's first version, else 0
    needs_group_index  the columns are grouped in an order of their own, so the file must hold that order
    stored_bits        of a code in the file, where they are not the grid's
    stored_group       columns that share a scale in the file, where llmq has no grid with as many
    stored_symmetric   whether the file calls the grid symmetric, where `stored_bits` has one with zeros take its place
    packing            which one, where a layout has several ways to lay tensors out; "" is its first
    in_place           the codes stand in `<module>.weight` itself, which belongs to the module's tensors then
    decode             gives (N, K) float32 from suffix -> tensor, for a weight that lies on no integer grid
    note               what else the file asks for, and llmq does not do
    """

    scheme: WeightScheme
    zeros_offset: int = 0
    needs_group_index: bool = False
    stored_bits: int = 0
    stored_group: int = 0
    stored_symmetric: bool = False
    packing: str = ""
    in_place: bool = False
    decode: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    note: str = ""

    @property
    def bits(self) -> int:
        """Bits of a code in the file."""
        return self.stored_bits or self.scheme.bits

    @property
    def group(self) -> GroupSize:
        """Columns that share a scale in the file; "channel" and "tensor" are all of them."""
        return self.stored_group or self.scheme.group_size

    def legal_group(self, in_features: int) -> int | None:
        """The most columns that share a scale, in a row of so many and a grid of llmq's; None where none has such.

        They are as many as in the file where that divides the row, and a divisor of both where not.
        """
        size = self.group
        if not isinstance(size, int) or size >= in_features:
            return in_features
        legal = (divisor for divisor in GROUP_SIZES if size % divisor == 0 and in_features % divisor == 0)
        return max(legal, default=None)

    @property
    def symmetric(self) -> bool:
        """Whether the file may leave out zeros, all of them being in the middle."""
        return self.stored_symmetric or self.scheme.symmetric


Reader = Callable[[str], Reading | None]
"""Module name (`model.layers.0.mlp.down_proj`) -> how to read it, or None where the file keeps it unquantized."""


class Readable(Protocol):
    """What a layout that is only read provides, as a module."""

    NAME: str  # what --format and, but for variants, the `quant_method` of config.json call it
    SUFFIXES: tuple[str, ...]  # of the tensors that replace `<module>.weight`; see `tensor_name`
    CODES: tuple[str, ...]  # those of them whose presence marks a module as quantized

    def unpack(self, tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
        """The exact inverse of `pack`, except that "tensor" comes back as "channel": that is how it is stored.

        `tensors` is suffix -> tensor; suffixes of others (bias) are left alone.  A file that declares a symmetric grid
        and holds zeros of its own gives an asymmetric one: (q - z) * s is what it says.  Raises `FormatError` for a
        tensor that is missing or has a wrong shape or dtype.
        """

    def weight_shape(
        self, shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(N, K) of a weight, from suffix -> shape; `read` gives a small tensor by suffix where shapes do not tell."""

    def read_config(self, config: Mapping[str, Any]) -> Reader:
        """How each module is read, for blocks of any writer.

        Raises `FormatError` naming what is declared but not supported.
        """


class Layout(Readable, Protocol):
    """What every file of this folder that is also written provides, as a module."""

    ONE_GRID: bool  # whether all packed modules of a file must have the same grid
    CONFIG_COPY: str | None  # a file that repeats the block of config.json, for the readers that look there

    def pack(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Suffix -> contiguous tensor, scales in the dtype that they have.

        Raises `FormatError` for a tensor that is damaged or that the layout cannot hold; ask `refusal` beforehand.
        """

    def refusal(self, scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
        """Why the layout cannot hold such a grid for such a weight, and which one can; None where it can."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that readers expect scales in; round to it before choosing codes."""

    def quantization_config(self, schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
        """The block for config.json: module `name` has the grid `schemes[name]`, `unquantized` stayed float.

        Raises `ConfigError` where one file of this layout cannot hold these grids side by side.
        """


def names() -> tuple[str, ...]:
    """Every layout that can be written, sorted: `awq`, `compressed-tensors`, …"""
    return tuple(sorted(set(_files()) - {*READ_ONLY, *STAGED_ONLY}))


def load(name: str) -> Layout:
    """The layout called `name`, to be written."""
    if name not in (*names(), *STAGED_ONLY):
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(names())}")
    return cast(Layout, _module(name))


def detect(quantization_config: Mapping[str, Any]) -> Readable:
    """The layout of a checkpoint, from the block `quantization_config` of its config.json."""
    known = sorted(set(_files()) - {"gptq_v2", *STAGED_ONLY})
    method = _method(quantization_config)
    if method not in known:
        raise FormatError(
            f"the checkpoint's quant_method is {method!r}, expected one of {', '.join(known)}",
            hint="start from the unquantized model, or from a checkpoint in one of these formats",
        )
    return cast(Readable, _module(method))


def tensor_name(module: str, suffix: str) -> str:
    """`a.b`, `qweight` -> `a.b.qweight`; a suffix with an underscore in front is part of the last name: `a.b_blocks`"""
    return module + suffix if suffix.startswith("_") else f"{module}.{suffix}"


def _files() -> dict[str, str]:
    """Name -> file, of every layout."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return {"gptq_v2" if file == "gptq_v2" else file.replace("_", "-"): file for file in files if file not in SHARED}


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{_files()[name]}")


def _method(config: Mapping[str, Any]) -> Any:
    """The `quant_method`; older writers left it out, or said it otherwise."""
    method = config.get("quant_method")
    if isinstance(method, str):
        plain = method.lower().replace("_", "-")
        return ALIASES.get(plain, plain)
    if method is None:
        for key, implied in (
            ("config_groups", "compressed-tensors"),
            ("autoround_version", "auto-round"),
            ("zero_point", "awq"),
            ("w_bit", "awq"),
            ("desc_act", "gptq"),
        ):
            if key in config:
                return implied
    return method
