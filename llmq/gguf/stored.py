"""A tensor to write to a GGUF file, read when it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """A tensor to write.

    name   its Hugging Face name
    kind   GGUF type; None where it is not quantized: then F32 for norms and other small tensors, F16 for the rest
    shape  of the weight, not of its bytes
    read   returns uint8 (N, bytes of a row) for a quantized type, else floats of this shape; called once
    """

    name: str
    kind: str | None
    shape: tuple[int, ...]
    read: Callable[[], Array]
