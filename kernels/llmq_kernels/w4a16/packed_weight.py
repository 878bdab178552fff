"""A packed weight as one value: what every version of the product takes, for NumPy arrays and for tensors."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

Array = TypeVar("Array")
Other = TypeVar("Other")


class PackedWeight(NamedTuple, Generic[Array]):
    """W (N, K) in 2 to 8 bits.  A *code* is one quantized value, an integer in [0, 2**bits - 1].

    words         (N, Kp / 16 * bits) int16: the codes in the layout of `reference.py`
    scales        (G, N) float16, bfloat16 or float32, of any sign, G = ceil(K / columns_per_group)
    zeros         (G, N) int16 zero points, or None where every zero point is 2**(bits - 1)
    bits          per code
    in_features   K
    columns_per_group
    column_order  (K,) int32 or int64, or None: column c of W multiplies x[..., column_order[c]]
    cpu_words, cpu_grid   the same weight in torch's int4 or int8 layout, from `small_batches.prepare`, or None: small
                  batches on a CPU then run in bfloat16

    A stack of E experts has a leading axis E in words, scales and zeros, and no other arrays.  `op.check` checks shapes
    and dtypes.  A named tuple, since a layer makes one per call: a frozen dataclass takes five times as long.
    """

    words: Array
    scales: Array
    zeros: Array | None
    bits: int
    in_features: int
    columns_per_group: int
    column_order: Array | None = None
    cpu_words: Array | None = None
    cpu_grid: Array | None = None

    @property
    def planes(self) -> int:
        """The columns of a group / 32, or 0 where one group is the whole row: how kernels take the group size."""
        return 0 if self.columns_per_group >= self.in_features else self.columns_per_group // 32

    def with_arrays(self, change: Callable[[Array], Other]) -> "PackedWeight[Other]":
        """The same weight with `change` applied to every array: one expert of a stack, or a copy on another device."""
        parts: list[Any] = [part if part is None or isinstance(part, int) else change(part) for part in self]
        return PackedWeight(*parts)
