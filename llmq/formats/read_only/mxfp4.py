"""gpt-oss as published: the experts of a layer stacked in one mxfp4 tensor (`fp4.py`), everything else in float.

    gate_up_proj_blocks  uint8 (E, 2I, K / 32, 16)   32 codes (floats of 4 bits) along K, even ones in low halves
    gate_up_proj_scales  uint8 (E, 2I, K / 32)       the exponent of the scale, a power of two, plus 127
    down_proj_…          the same with (E, N, …)

Rows of gate and up alternate.  The result is the parameter as float checkpoints of these models hold it: inputs before
outputs, (E, K, 2I), named `…experts.gate_up_proj`.

Source: github.com/huggingface/transformers, integrations/mxfp4.py, convert_moe_packed_tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Readable, Reader, Reading
from llmq.formats.codecs import checks, fp4
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

NAME = "mxfp4"
BYTES = 16  # of a group


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Readable.unpack`: always fails, as mxfp4 has no integer grid."""
    raise FormatError("a weight in mxfp4 has no integer grid, so it can be read only as floats")


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """(E, K, N) float32."""
    blocks = checks.stored(tensors, "_blocks", (torch.uint8,), (None, None, None, BYTES))
    scales = checks.stored(tensors, "_scales", (torch.uint8,), tuple(blocks.shape[:3]))
    weight = fp4.values_of(blocks) * fp4.powers(scales)[..., None]  # (E, N, K / 32, 32)
    return weight.flatten(-2).mT.contiguous()


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Readable.weight_shape`; N counts the rows of all experts."""
    E, N, groups, _ = shapes["_blocks"]
    return E * N, groups * fp4.MXFP4_GROUP


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Readable.read_config`.  The tensors alone show what is packed."""
    reading = Reading(WeightScheme(4, fp4.MXFP4_GROUP), packing=NAME, decode=decode)
    return lambda module: reading


LAYOUT = Readable(
    name=NAME,
    suffixes=("_blocks", "_scales"),
    codes=("_blocks",),
    needs=lambda reading: ("_blocks", "_scales"),
    unpack=unpack,
    weight_shape=weight_shape,
    read_config=read_config,
    quant_methods=(NAME,),
    in_transformers=False,  # transformers has its own loader for it
)
