"""Rows of a GGUF file into their blocks."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError

Bytes = NDArray[Any]


def split_blocks(kind: str, size: int, raw: Bytes) -> Bytes:
    """(N, bytes of a row) uint8 -> (B, size), the blocks of all rows; raises FormatError for an incomplete block."""
    if raw.shape[1] % size:
        raise FormatError(f"{kind} has blocks of {size} bytes, a row has {raw.shape[1]}", hint="is the file complete?")
    return np.ascontiguousarray(raw).reshape(-1, size)
