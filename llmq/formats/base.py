"""What a format is: `Layout` for one that is written and read, `Readable` for one that is only read.

A file of this folder ends with the value `LAYOUT`, which holds the functions of the file and everything that llmq has
to know of the format.  Fields with a default are left out where the default holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.numerics.affine_grid import ScaleDtype
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GROUP_SIZES, GroupSize, WeightScheme


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

Tensors = Mapping[str, Tensor]
"""Suffix -> tensor, of the tensors that stand in a checkpoint where `<module>.weight` stood."""


@dataclass(frozen=True, kw_only=True)
class Readable:
    """A format that can be read.

    name            as `--format`, messages and reports call it
    suffixes        of the tensors that replace `<module>.weight`; see `formats.tensor_name`
    codes           those of them whose presence marks a module as quantized
    unpack          tensors, reading -> the weight: the exact inverse of `pack`, except that the group size "tensor"
                    comes back as "channel", which is how it is stored.  Suffixes of other tensors (bias) are ignored.
                    Raises FormatError for a tensor that is missing or has a wrong shape or dtype
    weight_shape    suffix -> shape, reading, read -> (N, K) of a weight; `read` gives a small tensor by its suffix,
                    where shapes do not tell
    read_config     the block `quantization_config` of config.json, of any writer -> how each module is read.  Raises
                    FormatError naming what is declared and not supported
    quant_methods   values of `quant_method` in that block that mean this format, in lower case with hyphens
    implied_by      keys of a block without `quant_method` that mean this format
    own_files       files in which older writers kept the block
    own_keys        keys of config.json, other than `quantization_config`, that hold the block
    exclusions      keys of the block that list modules which stay float
    in_transformers whether `llmq.enable_transformers` may load such a checkpoint
    """

    name: str
    suffixes: tuple[str, ...]
    codes: tuple[str, ...]
    unpack: Callable[[Tensors, Reading], QuantizedTensor]
    weight_shape: Callable[[Mapping[str, tuple[int, ...]], Reading, Callable[[str], Tensor]], tuple[int, int]]
    read_config: Callable[[Mapping[str, Any]], Reader]
    quant_methods: tuple[str, ...] = ()
    implied_by: tuple[str, ...] = ()
    own_files: tuple[str, ...] = ()
    own_keys: tuple[str, ...] = ()
    exclusions: tuple[str, ...] = ()
    in_transformers: bool = True


@dataclass(frozen=True, kw_only=True)
class Layout(Readable):
    """A format that can also be written.

    pack                 the weight -> suffix -> contiguous tensor, scales in the dtype that they have.  Raises
                         FormatError for a weight that is damaged or that the format cannot hold; ask `refusal` first
    refusal              scheme, out_features, in_features -> why the format cannot hold such a grid for such a weight,
                         and which format can; None where it can
    scale_dtype          dtype of the model -> the dtype that readers expect scales in
    quantization_config  module -> scheme, names of the modules that stay float -> the block for config.json.  Raises
                         ConfigError where one file of this format cannot hold these grids together
    pack_like            the weight, reading -> the same as `pack`, for a file whose other weights are read in this way;
                         None where `pack` does it
    scale_values         what scales are rounded to, where that is not `scale_dtype` of the model's dtype
    one_grid             whether all packed modules of a file must have the same grid
    holds_head           whether readers accept a quantized lm_head
    any_scale_dtype      whether readers accept scales of any dtype
    config_copy          a file that repeats the block of config.json, for readers that look there
    """

    pack: Callable[[QuantizedTensor], dict[str, Tensor]]
    refusal: Callable[[WeightScheme, int, int], str | None]
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    quantization_config: Callable[[Mapping[str, WeightScheme], Sequence[str]], dict[str, Any]]
    pack_like: Callable[[QuantizedTensor, Reading], dict[str, Tensor]] | None = None
    scale_values: ScaleDtype | None = None
    one_grid: bool = False
    holds_head: bool = True
    any_scale_dtype: bool = False
    config_copy: str | None = None
