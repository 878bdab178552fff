"""GPTQ in its second version for every grid: zero points are stored without an offset.  See `gptq.py`.

`gptq` writes symmetric grids in the first version, which all programs read.  This format is for readers that need the
second version, and for files with both symmetric and asymmetric grids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmq.formats import gptq
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

NAME = "gptq_v2"


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    return gptq.pack(q, version=NAME)


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`.  The `quant_method` is that of gptq."""
    return gptq.quantization_config(schemes, unquantized, version=NAME)


LAYOUT = dataclasses.replace(
    gptq.LAYOUT,
    name=NAME,
    pack=pack,
    quantization_config=quantization_config,
    quant_methods=(),  # such a checkpoint is read as gptq: its config.json states the version
    implied_by=(),
    own_files=(),
)
