"""Small floats in compressed-tensors: the tensors of each grid of floats, and how config.json declares them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Reading
from llmq.formats.codecs import fp4, fp8
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

DECODERS = {"nvfp4": fp4.nvfp4, "mxfp4": fp4.mxfp4, "fp8": fp8.decode_rows, "fp8-block": fp8.decode_blocks}
PACKINGS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", fp8.PACKING)
FIXED = ("num_bits", "type", "symmetric", "dynamic")  # what a grid of floats declares, next to the size of its groups


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    return fp4.pack(q) if q.scheme.few_scales else fp8.pack(q)


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    """See `Layout.unpack`."""
    return fp4.unpack(tensors, scheme) if scheme.few_scales else fp8.unpack(tensors, scheme)


def refusal(scheme: WeightScheme, out_features: int) -> str | None:
    """Why a weight with this number of rows cannot have the scales of the grid, or None."""
    rows = scheme.rows_per_scale
    if out_features % rows == 0:
        return None
    return f"blocks of {rows} rows do not divide {out_features} rows, and engines fuse layers at whole blocks only"


def packing_of(scheme: WeightScheme) -> str:
    """The name of the form in which such weights are stored."""
    return f"{scheme.floats}-pack-quantized" if scheme.few_scales else fp8.PACKING


def weights_block(scheme: WeightScheme) -> dict[str, Any]:
    """How config.json declares such weights."""
    return fp4.weights_block(scheme) if scheme.few_scales else fp8.weights_block(scheme)


def reading(packing: str, weights: Mapping[str, Any], note: str) -> Reading:
    """How weights of one of `PACKINGS` are read, from their block in config.json.

    Raises FormatError for another grid.
    """
    in_place = packing == fp8.PACKING
    scheme = fp8.declared_scheme(weights) if in_place else WeightScheme.of_floats(packing.partition("-")[0])
    strategies = ["channel", "tensor", "block"] if in_place else ["group", "tensor_group"]
    size = "group_size" if scheme.few_scales else "block_structure"
    expected = {key: value for key, value in weights_block(scheme).items() if key in (*FIXED, size)}
    declared = {key: weights.get(key, value) for key, value in expected.items()}
    if declared != expected or weights.get("strategy", strategies[0]) not in strategies:
        raise FormatError(
            f"the checkpoint declares {packing} with {dict(weights)}, expected {expected} and scales per "
            f"{' or '.join(strategies)}"
        )
    decode = DECODERS[str(scheme)]
    return Reading(scheme, packing=packing, in_place=in_place, decode=decode, note=note)
