"""DeepSeek's and Qwen's own checkpoints in FP8, `quant_method` "fp8": E4M3 with one scale per 128 x 128 weights.

    weight            float8_e4m3fn (N, K)
    weight_scale_inv  float (ceil(N / 128), K / 128)    the scale itself, by which a value is multiplied

The tensors show which layers are quantized.  Weights are those of `fp8-block` (`codecs/fp8.py`).  Engines also round
the inputs, which llmq does not.

Not covered: one scale per weight (a file without `weight_block_size`), blocks of other sizes.

Source: github.com/deepseek-ai/DeepSeek-V3, inference/kernel.py, weight_dequant.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Readable, Reader, Reading
from llmq.formats.codecs import fp8
from llmq.formats.foreign import DEQUANTIZE
from llmq.numerics.quantized_tensor import QuantizedTensor

NAME, SCALE = "fp8", "weight_scale_inv"
BLOCK = [fp8.BLOCKS.rows_per_scale, fp8.BLOCKS.group_size]
INPUTS = "quantized activations"


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Readable.unpack`."""
    return fp8.unpack(_named(tensors), fp8.BLOCKS)


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, K) float32: value * scale"""
    return fp8.decode_blocks(_named(tensors))


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Readable.weight_shape`."""
    N, K = shapes["weight"]
    return N, K


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Readable.read_config`."""
    declared = {key: config.get(key) for key in ("fmt", "weight_block_size")}
    if declared["fmt"] not in (None, "e4m3") or declared["weight_block_size"] != BLOCK:
        raise FormatError(
            f"the checkpoint has 8-bit floats with {declared}, expected e4m3 in blocks of {BLOCK}", hint=DEQUANTIZE
        )
    reading = Reading(fp8.BLOCKS, packing=str(fp8.BLOCKS), in_place=True, decode=decode, note=INPUTS)
    return lambda module: reading


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the names of compressed-tensors."""
    return {"weight_scale" if suffix == SCALE else suffix: tensor for suffix, tensor in tensors.items()}


LAYOUT = Readable(
    name=NAME,
    suffixes=(SCALE,),
    codes=(SCALE,),
    needs=lambda reading: ("weight", SCALE),
    unpack=unpack,
    weight_shape=weight_shape,
    read_config=read_config,
    quant_methods=(NAME,),
    in_transformers=False,  # transformers has its own loader for it
)
