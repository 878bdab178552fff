"""The entry point of the search for scales.

R rows, G groups per row, g columns per group.

    groups   (R, G, g) float32   the weight
    costs    (G, g)    float32   the cost of an error in each column; or (R, G, g)
    first    scales and zero points (R, G) float32: the candidate to start from
    widest   (R, G)    float32   the scale for a factor of 1
    zeros    (R, G)    float32   the zero point for a shift of 0, an integer in [0, levels]

All on one device.  A candidate replaces the best so far only where its error is lower.  In order: `first`;
scale widest * factor with `zeros`, for every factor; then, around the best scale so far, best + widest * offset with
zeros + shift, for every offset and, within it, every shift.  Before its error is computed, a scale is clamped and
rounded to the value that a file of `dtype` would store.
"""

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.arguments import FLOATS, listed
from llmq_kernels.errors import KernelInputError
from llmq_kernels.grid_search import torch_path
from llmq_kernels.grid_search.candidates import Candidates

LARGEST_GROUP = 1024  # columns that a program can hold; larger groups use torch


def search(
    groups: Tensor,
    costs: Tensor,
    first: tuple[Tensor, Tensor],
    widest: Tensor,
    zeros: Tensor,
    candidates: Candidates,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (R, G) float32 of least error among the candidates.

    Raises KernelInputError unless the arguments are those described at the top of this file.
    """
    check(groups, costs, first, widest, zeros, candidates)
    narrow = groups.shape[2] <= LARGEST_GROUP and costs.dim() == 2
    if narrow and groups.numel() and backend.choose(groups.device).name == "triton":
        from llmq_kernels.grid_search import triton_kernel

        return triton_kernel.search(groups, costs, first, widest, zeros, candidates)
    return torch_path.search(groups, costs, first, widest, zeros, candidates)


def check(
    groups: Tensor, costs: Tensor, first: tuple[Tensor, Tensor], widest: Tensor, zeros: Tensor, candidates: Candidates
) -> None:
    """Raise KernelInputError unless the arguments are those that `search` accepts.  Values are not read."""
    if groups.dim() != 3 or costs.shape not in (groups.shape, groups.shape[1:]):
        raise KernelInputError(
            f"groups are {tuple(groups.shape)} and costs {tuple(costs.shape)}, expected (R, G, g) and (G, g)"
        )
    for name, tensor in {"first scales": first[0], "first zeros": first[1], "widest": widest, "zeros": zeros}.items():
        if tensor.shape != groups.shape[:2]:
            raise KernelInputError(f"{name}: found {tuple(tensor.shape)}, expected {tuple(groups.shape[:2])}")
    named = {"groups": groups, "costs": costs, "widest": widest, "zeros": zeros}
    for name, tensor in {**named, "first scales": first[0], "first zeros": first[1]}.items():
        if tensor.dtype != torch.float32 or tensor.device != groups.device:
            raise KernelInputError(
                f"{name}: found {tensor.dtype} on {tensor.device}, expected torch.float32 on {groups.device}"
            )
    if candidates.dtype not in FLOATS:
        raise KernelInputError(f"scales cannot be stored in {candidates.dtype}, expected {listed(FLOATS)}")
