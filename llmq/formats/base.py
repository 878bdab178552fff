"""The interface of a format: `Layout` for formats that llmq writes and reads, `Readable` for those that it only reads.

A file of this folder ends with the value `LAYOUT`.  It holds the functions of the file and everything that llmq has to
know about the format.  Fields with a default are left out where the default is right.

*Codes* are the quantized values, unsigned integers; *zeros* are the zero points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.numerics.affine_grid import ScaleDtype
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GROUP_SIZES, GroupSize, InputScheme, Scheme, WeightScheme


@dataclass(frozen=True)
class Reading:
    """How to read the tensors of one module: its grid, and settings that the tensors alone do not show.

    scheme             the grid of the result of `unpack`, except for incomplete groups at the end of a row
    zeros_offset       what was subtracted from every zero point before packing: 1 in gptq's first version, else 0
    needs_group_index  whether columns are grouped in a separate order (activation order), which the file must hold
    stored_group       columns that share a scale in the file, where llmq has no grid with this group size
    packing            the variant, where a layout has several ways to arrange its tensors; "" is the first one
    in_place           whether the codes are in `<module>.weight` itself, which is then one of the packed tensors
    decode             suffix -> tensor gives (N, K) float32, for a weight without an integer grid
    inputs             how the file declares the inputs of the layer as quantized, where llmq computes this
    note               what else the file declares that llmq does not do
    """

    scheme: WeightScheme
    zeros_offset: int = 0
    needs_group_index: bool = False
    stored_group: int = 0
    packing: str = ""
    in_place: bool = False
    decode: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    inputs: InputScheme | None = None
    note: str = ""

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.scheme.bits

    @property
    def group(self) -> GroupSize:
        """Columns that share a scale in the file; "channel" and "tensor" mean all columns."""
        return self.stored_group or self.scheme.group_size

    def legal_group(self, in_features: int) -> int | None:
        """The largest group size of a grid of llmq for rows of `in_features` columns; None where there is none.

        It is the group size of the file where that divides the row, else the largest common divisor that llmq has.
        """
        size = self.group
        if not isinstance(size, int) or size >= in_features:
            return in_features
        legal = (divisor for divisor in GROUP_SIZES if size % divisor == 0 and in_features % divisor == 0)
        return max(legal, default=None)

    @property
    def symmetric(self) -> bool:
        """Whether the file may omit zero points, because all of them are in the middle."""
        return self.scheme.symmetric


Reader = Callable[[str], Reading | None]
"""Module name (`model.layers.0.mlp.down_proj`) -> how to read it, or None where the file keeps it in float."""

Tensors = Mapping[str, Tensor]
"""Suffix -> tensor, of the tensors that replace `<module>.weight` in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Readable:
    """A format that can be read.

    name            the name in `--format`, messages and reports
    suffixes        of the tensors that replace `<module>.weight`; see `formats.tensor_name`
    codes           the suffixes whose presence marks a module as quantized
    unpack          (tensors, reading) -> the weight: the exact inverse of `pack`, except that the group size "tensor"
                    is returned as "channel", as it is stored.  Suffixes of other tensors (bias) are ignored.
                    Raises FormatError for a tensor that is missing or has a wrong shape or dtype
    weight_shape    (suffix -> shape, reading, read) -> (N, K) of a weight; `read` loads a small tensor by its suffix,
                    where shapes are not enough
    read_config     the block `quantization_config` of config.json, of any writer -> how each module is read.  Raises
                    FormatError with what is declared but not supported
    quant_methods   values of `quant_method` in that block that mean this format, in lower case with hyphens
    implied_by      keys that mean this format in a block without `quant_method`
    own_files       files in which older writers stored the block
    own_keys        keys of config.json, other than `quantization_config`, that hold the block
    exclusions      keys of the block that list modules kept in float
    needs           reading -> suffixes of the tensors without which a weight cannot be read
    not_applied     suffixes of tensors that belong to what `Reading.note` names
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
    needs: Callable[[Reading], tuple[str, ...]] = lambda reading: ()
    not_applied: tuple[str, ...] = ()
    in_transformers: bool = True


@dataclass(frozen=True, kw_only=True)
class QuantizedInputs:
    """How a format stores layers whose inputs are quantized, too.

    refusal              scheme -> why no engine computes with such inputs and weights; None where one does
    pack                 (the weight, how its inputs are quantized) -> as `Layout.pack`
    scale                the static scale of the inputs of a layer, from its tensors
    quantization_config  as `Layout.quantization_config`, with schemes of weights and inputs
    """

    refusal: Callable[[Scheme], str | None]
    scale: Callable[[Tensors], float]
    pack: Callable[[QuantizedTensor, InputScheme], dict[str, Tensor]]
    quantization_config: Callable[[Mapping[str, Scheme], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Layout(Readable):
    """A format that can also be written.

    pack                 the weight -> suffix -> contiguous tensor; scales keep their dtype.  Raises FormatError for a
                         weight that is damaged or that the format cannot hold; call `refusal` first
    refusal              (scheme, out_features, in_features) -> why the format cannot hold such a grid for such a
                         weight, and which format can; None where it can
    scale_dtype          dtype of the model -> the dtype in which readers expect scales
    quantization_config  (module -> scheme, names of the modules kept in float) -> the block for config.json.  Raises
                         ConfigError where one file of this format cannot hold all these grids
    pack_like            (the weight, reading) -> as `pack`, for a file whose other weights are read in this way; None
                         where `pack` is enough
    with_inputs          how layers with quantized inputs are stored; None where the format has no place for this
    scale_values         the values that scales are rounded to, where these differ from `scale_dtype` of the model
    one_grid             whether all packed modules of a file must have the same grid
    holds_head           whether readers accept a quantized lm_head
    any_scale_dtype      whether readers accept scales of any dtype
    config_keys          keys of config.json that hold the block
    config_copy          a file with a copy of the block of config.json, for readers that need it
    """

    pack: Callable[[QuantizedTensor], dict[str, Tensor]]
    refusal: Callable[[WeightScheme, int, int], str | None]
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    quantization_config: Callable[[Mapping[str, WeightScheme], Sequence[str]], dict[str, Any]]
    pack_like: Callable[[QuantizedTensor, Reading], dict[str, Tensor]] | None = None
    with_inputs: QuantizedInputs | None = None
    scale_values: ScaleDtype | None = None
    one_grid: bool = False
    holds_head: bool = True
    any_scale_dtype: bool = False
    config_keys: tuple[str, ...] = ("quantization_config",)
    config_copy: str | None = None

    def pack_layer(self, q: QuantizedTensor, inputs: InputScheme | None) -> dict[str, Tensor]:
        """The tensors of a layer, as `pack`."""
        if inputs is None:
            return self.pack(q)
        return self._with_inputs().pack(q, inputs)

    def declare(self, schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
        """The block for config.json, as `quantization_config`, of layers with quantized weights."""
        if any(scheme.inputs is not None for scheme in schemes.values()):
            return self._with_inputs().quantization_config(schemes, unquantized)
        grids = {name: scheme.weights for name, scheme in schemes.items() if scheme.weights is not None}
        return self.quantization_config(grids, unquantized)

    def refusal_of(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """As `refusal`, of a layer whose inputs may be quantized, too."""
        no_engine = self.with_inputs.refusal(scheme) if self.with_inputs is not None and scheme.inputs else None
        if no_engine is not None or scheme.weights is None:
            return no_engine
        return self.refusal(scheme.weights, out_features, in_features)

    def _with_inputs(self) -> QuantizedInputs:
        if self.with_inputs is None:
            raise ConfigError(f"{self.name} has no place for quantized inputs", hint="use compressed-tensors")
        return self.with_inputs
