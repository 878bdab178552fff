"""What GPTQ's inner loop works on, as one value that is checked when it is made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.arguments import require
from llmq_kernels.errors import KernelInputError
from llmq_kernels.value_tables import ValueTable


@dataclass(frozen=True)
class Problem:
    """E experts, K columns in the order in which they are quantized, N rows of the weight, G groups.

    columns   (E, K, N) float32   the weight, with any strides; overwritten with errors
    upper     (E, K, K) float32   U, the upper Cholesky factor of H⁻¹ in that order, with any strides
    scales    (E, G, N) float32   of any sign, not zero
    zeros     (E, G, N) float32   zero points, integers or with real offsets any numbers; 2**(bits - 1) if symmetric
    group_of  (E, K)    int32     the group of each column
    levels                        2**bits - 1, at most 255
    table                         what codes stand for where these are not integers; zero points then have no effect

    All on one device; scales, zeros and group_of contiguous.  Fast if the rows of a column are contiguous and, on GPUs,
    if the factor is.  Raises KernelInputError for anything else; values on the device are not read.
    """

    columns: Tensor
    upper: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    levels: int
    table: ValueTable | None = None

    def __post_init__(self) -> None:
        columns, scales = self.columns, self.scales
        if columns.dim() != 3 or scales.dim() != 3:
            raise KernelInputError(
                f"columns are {tuple(columns.shape)} and scales {tuple(scales.shape)}, expected (E, K, N) and (E, G, N)"
            )
        (E, K, N), G, device, floats = columns.shape, scales.shape[1], columns.device, (torch.float32,)
        require("columns", columns, floats, (E, K, N), device, contiguous=False)
        require("upper", self.upper, floats, (E, K, K), device, contiguous=False)
        require("scales", scales, floats, (E, G, N), device)
        require("zeros", self.zeros, floats, (E, G, N), device)
        require("group_of", self.group_of, (torch.int32,), (E, K), device)
        if not 1 <= self.levels <= 255:
            raise KernelInputError(f"levels is {self.levels}, expected 1 to 255")
