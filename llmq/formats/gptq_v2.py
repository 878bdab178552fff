"""GPTQ with every zero stored as it is, whatever the grid: `gptq.py` says the rest.

`gptq` writes symmetric grids in the first version, which everything reads.  This is for readers that want the second,
and for files with symmetric and asymmetric grids side by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmq.formats import gptq
from llmq.formats.gptq import CODES, CONFIG_COPY, ONE_GRID, SUFFIXES, read_config, refusal, scale_dtype, unpack
from llmq.formats.gptq import weight_shape as weight_shape
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

__all__ = [
    "CODES", "CONFIG_COPY", "NAME", "ONE_GRID", "SUFFIXES",
    "pack", "quantization_config", "read_config", "refusal", "scale_dtype", "unpack", "weight_shape",
]  # fmt: skip

NAME = "gptq_v2"


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    return gptq.pack(q, version=NAME)


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`; the `quant_method` is gptq's."""
    return gptq.quantization_config(schemes, unquantized, version=NAME)
