"""Which columns of a product's weight are which quantized weights, by value.

An exporter changes names, transposes weights, and stacks those that share an input (q, k and v; gate and up). Their
values stay the same, bit for bit, so values identify them: no list of names is needed for any architecture.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.runtime.checkpoint_weights import PackedWeights

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `stop` of a product: a quantized weight by its name, or floats (None)."""

    module: str | None
    start: int
    stop: int


class KnownWeights:
    """The packed weights of a checkpoint, recognized in matrices (K, N) that may hold several of them side by side.

    Kept in memory is the first row of each weight. A weight is dequantized again when its first row matches.
    """

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed
        self._first_rows = {module: packed.weight(module)[0].numpy() for module in packed.modules}
        self._used = set[str]()
        self._by_corner: dict[float, list[str]] = defaultdict(list)
        for module, row in self._first_rows.items():
            self._by_corner[float(row[0])].append(module)

    def columns(self, matrix: Matrix) -> list[Columns]:
        """The columns of a matrix (K, N) in order; a single entry without a module if it holds no quantized weight."""
        known = list(self._found(matrix))
        every: list[Columns] = []
        end = 0
        for part in [*known, Columns(None, matrix.shape[1], matrix.shape[1])]:
            if part.start > end:
                every.append(Columns(None, end, part.start))
            if part.module is not None:
                every.append(part)
            end = part.stop
        return every

    def _found(self, matrix: Matrix) -> Iterator[Columns]:
        """The quantized weights in a matrix, from left to right."""
        corners = np.fromiter(self._by_corner, np.float32, len(self._by_corner))
        end = 0
        for start in np.flatnonzero(np.isin(matrix[0], corners)).tolist():
            if start < end:
                continue
            equal_corner = self._by_corner[float(matrix[0, start])]
            for module in sorted(equal_corner, key=self._used.__contains__):  # several may have equal values
                if self._starts_at(matrix, start, module):
                    self._used.add(module)
                    end = start + self._packed.shape(module)[0]
                    yield Columns(module, start, end)
                    break

    def _starts_at(self, matrix: Matrix, start: int, module: str) -> bool:
        N, K = self._packed.shape(module)
        if matrix.shape[0] != K or start + N > matrix.shape[1]:
            return False
        if not np.array_equal(matrix[:, start], self._first_rows[module]):
            return False
        return np.array_equal(matrix[:, start : start + N], self._packed.weight(module).numpy().T)
