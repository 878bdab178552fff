"""Small floats in compressed-tensors: the tensors of each grid of floats, and how config.json declares them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Reading
from llmq.formats.codecs import fp4, fp8
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

DECODERS = {"nvfp4-pack-quantized": fp4.nvfp4, "mxfp4-pack-quantized": fp4.mxfp4, fp8.PACKING: fp8.decode}
PACKINGS = tuple(DECODERS)


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    return fp4.pack(q) if q.scheme.few_scales else fp8.pack(q)


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedTensor:
    """See `Layout.unpack`."""
    return fp4.unpack(tensors, scheme) if scheme.few_scales else fp8.unpack(tensors)


def packing_of(scheme: WeightScheme) -> str:
    """The name of the form in which such weights are stored."""
    return f"{scheme.floats}-pack-quantized" if scheme.few_scales else fp8.PACKING


def weights_block(scheme: WeightScheme) -> dict[str, Any]:
    """How config.json declares such weights."""
    return fp4.weights_block(scheme) if scheme.few_scales else fp8.DECLARED


def reading(packing: str, weights: Mapping[str, Any], note: str) -> Reading:
    """How weights of one of `PACKINGS` are read, from their block in config.json.

    Raises FormatError for another grid.
    """
    scheme = fp8.SCHEME if packing == fp8.PACKING else WeightScheme.of_floats(packing.partition("-")[0])
    fixed = ("num_bits", "type", "symmetric", "dynamic", *(["group_size"] if scheme.few_scales else []))
    expected = {key: weights_block(scheme)[key] for key in fixed}
    declared = {key: weights.get(key, value) for key, value in expected.items()}
    strategies = ("channel", "tensor") if packing == fp8.PACKING else ("group", "tensor_group")
    if declared != expected or weights.get("strategy", strategies[0]) not in strategies:
        raise FormatError(
            f"the checkpoint declares {packing} with {dict(weights)}, expected {expected} and scales per "
            f"{' or '.join(strategies)}"
        )
    in_place = packing == fp8.PACKING
    return Reading(scheme, packing=packing, in_place=in_place, decode=DECODERS[packing], note=note)
