"""What a GGUF file changes in a tensor of a model: the order of its rows, and its values.

    Rows    the tensors of the file that hold the rows of one tensor of the model, each with the numbers of these rows
    Value   what happens to the numbers of a float tensor, and back

Rows are moved as a whole, so the blocks of a quantized weight do not change.  Both can be undone, for reading a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import FormatError

Array = NDArray[Any]
Order = NDArray[np.int64]
Config = Mapping[str, Any]
Rows = Callable[[Config], dict[str, Order]]
"""Configuration -> the name of each tensor in the block of the file, and which rows of the model's tensor it has."""


@dataclass(frozen=True)
class Value:
    """A change of a float tensor.  `backward` gets the values of the file, and returns those of the model."""

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape


def plus(offset: float) -> Value:
    """Norms that the model applies as x * (1 + w)."""
    return Value(lambda weight: weight + np.float32(offset), lambda weight: weight - np.float32(offset))


ONE_MORE = plus(1.0)
DECAY = Value(lambda logarithm: -np.exp(logarithm), lambda decay: np.log(-decay))
TRANSPOSED = Value(np.transpose, np.transpose, lambda shape: shape[::-1])
PER_CHANNEL = Value(
    lambda weight: weight.reshape(len(weight), -1),
    lambda weight: weight[:, None, :],
    lambda shape: (shape[0], shape[-1]),
)
"""A convolution of every channel with itself: (C, 1, K) in the model, (C, K) in the file."""


def interleaved(name: str, heads: str) -> Rows:
    """The rows of q or k for llama.cpp's "NORM" rotation; `heads` is the entry with the number of heads.

    transformers rotates row i of a head with row i + D/2, llama.cpp rows 2 i and 2 i + 1.
    """

    def rows(config: Config) -> dict[str, Order]:
        count = int(config.get(heads) or config["num_attention_heads"])
        return {name: np.arange(count * head_size(config)).reshape(count, 2, -1).swapaxes(1, 2).ravel()}

    return rows


def joined_heads(config: Config) -> dict[str, Order]:
    """GPT-NeoX has q, k and v of a head one after the other; the file has q of all heads, then k, then v."""
    heads = config["num_attention_heads"]
    return {"attn_qkv": np.arange(3 * heads * head_size(config)).reshape(heads, 3, -1).swapaxes(0, 1).ravel()}


def head_size(config: Config) -> int:
    """The number of channels of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def in_columns(rows: Array, order: Order, block: int) -> Array:
    """The columns of a weight in another order, as floats (N, K), or as blocks of `block` columns each (N, bytes)."""
    blocks = order.reshape(-1, block)
    if (blocks[:, :1] % block).any() or (np.diff(blocks, axis=1) != 1).any():
        raise FormatError(f"its columns have another order in the file, which divides blocks of {block} weights")
    return rows.reshape(len(rows), len(blocks), -1)[:, blocks[:, 0] // block].reshape(len(rows), -1)


def undone(parts: list[tuple[Order, Array]]) -> Array:
    """The rows of the model's tensor from its parts in the file, each with its `Order`."""
    first = parts[0][1]
    rows = np.empty((sum(len(order) for order, _ in parts), *first.shape[1:]), dtype=first.dtype)
    for order, part in parts:
        rows[order] = part
    return rows
