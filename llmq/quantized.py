"""`QuantizedTensor`: the only thing that passes between algorithms, formats and kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.config import Scheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight on its grid: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g the group of column k.

    codes        (N, K) uint8, in [0, 2**bits - 1]
    scales       (N, G) in the dtype that the file stores; any finite value, negative ones too
    zeros        (N, G) int16, or None where every zero is 2**(bits - 1)
    group_index  (K,) int32 group of each column, or None where it is k // columns_per_group
    scheme       bits, group size, symmetry

    N out_features, K in_features, G groups.  "channel" has G = 1; so has "tensor", its one scale repeated N times.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    group_index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def column_groups(self) -> Tensor:
        """(K,) int64: the group of each column."""
        if self.group_index is not None:
            return self.group_index.long()
        per_group = self.scheme.columns_per_group(self.codes.shape[1])
        return torch.arange(self.codes.shape[1], device=self.codes.device) // per_group

    def dequantize(self) -> Tensor:
        """(N, K) float32, computed in float32 from the stored scales: what every reader of the file computes."""
        groups = self.column_groups()
        centred = self.codes.to(torch.float32)  # (N, K)
        if self.zeros is None:
            centred -= self.scheme.middle
        else:
            centred -= self.zeros.to(torch.float32)[:, groups]
        return centred.mul_(self.scales.to(torch.float32)[:, groups])

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """The out_features from `start` to `stop`, sharing memory."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantizedTensor(self.codes[start:stop], self.scales[start:stop], zeros, self.scheme, self.group_index)
