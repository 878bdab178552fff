"""Amounts of work, by kind: what a machine needs time for."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

OPERATIONS_PER_CANDIDATE = 11  # of torch, in the search for scales
OPERATIONS_PER_COLUMN = 9  # in the column loop


class Kind(enum.Enum):
    """A kind of work; the value is its unit, as tables show it."""

    FLOAT32 = "float32 FLOP"  # matrix products in float32
    HALF = "half FLOP"  # matrix products of float16 or bfloat16
    FLOAT64 = "float64 FLOP"  # factorization
    SEARCHED = "candidates"  # of the search for scales: one per weight and tried scale
    COLUMNS = "weights in the column loop"
    MOVED = "element-wise bytes"  # read and written by operations that are not products
    CALLS = "operations"  # of torch; each has a constant overhead
    READ = "bytes read"  # from files
    WRITTEN = "bytes written"
    SENT = "bytes sent"  # to other ranks

    @property
    def is_product(self) -> bool:
        """Whether the unit is FLOP."""
        return self in (Kind.FLOAT32, Kind.HALF, Kind.FLOAT64)


@dataclass(frozen=True)
class Work:
    """An amount of work per kind; kinds that are absent are zero."""

    amounts: Mapping[Kind, float] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Kind, amount: float) -> "Work":
        return cls({kind: amount})

    def __add__(self, other: "Work") -> "Work":
        return Work({kind: self[kind] + other[kind] for kind in {**self.amounts, **other.amounts}})

    def __mul__(self, factor: float) -> "Work":
        return Work({kind: factor * amount for kind, amount in self.amounts.items()})

    def __getitem__(self, kind: Kind) -> float:
        return self.amounts.get(kind, 0.0)

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products and factorizations; a multiply-add counts as two."""
        return sum(amount for kind, amount in self.amounts.items() if kind.is_product)


def total(parts: "list[Work]") -> Work:
    """The sum of all parts."""
    result = Work()
    for part in parts:
        result += part
    return result
