"""The entry point of a step: whether the kernel runs here, and the checks of its arguments.

N rows, K columns, G groups of K / G columns each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.arguments import FLOATS, require
from llmq_kernels.errors import KernelInputError


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on `device`; if not, a caller uses torch."""
    return backend.choose(device).name == "triton"


@dataclass(frozen=True)
class Codes:
    """The codes of a weight on a uniform grid at the start of tuning, and its grid now.

    origin  (N, K) uint8, q₀
    scales  (N, G) float16, bfloat16 or float32, of any sign
    zeros   (N, G) int16 zero points, or None where all are 2**(bits - 1)
    levels  2**bits - 1, at most 255
    """

    origin: Tensor
    scales: Tensor
    zeros: Tensor | None
    levels: int

    def __post_init__(self) -> None:
        origin, scales = self.origin, self.scales
        if origin.dim() != 2 or scales.dim() != 2 or not scales.shape[1] or origin.shape[1] % scales.shape[1]:
            raise KernelInputError(
                f"codes are {tuple(origin.shape)} and scales {tuple(scales.shape)}, expected (N, K) and (N, G) with "
                "groups of the same width"
            )
        require("codes", origin, (torch.uint8,), tuple(origin.shape), origin.device)
        require("scales", scales, FLOATS, (len(origin), scales.shape[1]), origin.device)
        if self.zeros is not None:
            require("zeros", self.zeros, (torch.int16,), tuple(scales.shape), origin.device)
        if not 1 <= self.levels <= 255:
            raise KernelInputError(f"levels is {self.levels}, expected 1 to 255")


def step(
    of: Codes, gradient: Tensor, moments: tuple[Tensor, Tensor, Tensor], divisor: float, rate: float, number: int,
    result: tuple[Tensor, Tensor] | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Take step `number`, counted from 0, on a device where `runs_on`.  No call synchronizes with the device.

    gradient  (N, K) any float; G is this divided by `divisor`, and 0 where that is not finite
    moments   v and Adam's means of g and g², (N, K) any float, updated in place
    result    (N, K) uint8 and (N, K) any float: the codes after the step, and the weight, are written there
    sums      (N, G) float32: Σ G (q - z) of each group before the step is written there

    Raises KernelInputError for anything else.
    """
    check(of, gradient, moments, result, sums)
    if of.origin.numel() == 0:
        return
    from llmq_kernels.tuning_step import triton_kernel

    grid = of.origin, of.scales, of.zeros, of.levels
    triton_kernel.step(gradient, moments, *grid, divisor, rate, number, result, sums)


def check(
    of: Codes, gradient: Tensor, moments: tuple[Tensor, Tensor, Tensor], result: tuple[Tensor, Tensor] | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    """Raise KernelInputError unless the arguments are those that `step` documents."""
    shape, device = tuple(of.origin.shape), of.origin.device
    named = {"gradient": gradient, **dict(zip(("v", "mean", "square"), moments, strict=True))}
    if result is not None:
        require("the codes", result[0], (torch.uint8,), shape, device)
        named["weight"] = result[1]
    for name, tensor in named.items():
        require(name, tensor, FLOATS, shape, device)
    if sums is not None:
        require("sums", sums, (torch.float32,), tuple(of.scales.shape), device)
