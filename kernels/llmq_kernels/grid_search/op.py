"""The door to the search for scales.

Shapes: R rows, G groups of a row, g columns of a group.

    groups   (R, G, g) float32   the weight
    costs    (G, g)    float32   what an error in each column costs; or (R, G, g)
    first    scales and zeros (R, G) float32: the candidate that the others have to beat
    widest   (R, G)    float32   the scale that a factor of 1 stands for
    zeros    (R, G)    float32   the zero that a shift of 0 stands for, an integer in [0, levels]

All on one device.  Candidates, each replacing the best so far only where its error is lower: `first`; scale
widest * factor with `zeros`, for every factor; then, around the best scale by then, best + widest * offset with
zeros + shift, for every offset and, within it, every shift.  Scales are clamped and rounded to what a file of `dtype`
gives back before their error is taken.
"""

import torch
from torch import Tensor

from llmq_kernels import backend
from llmq_kernels.errors import KernelInputError
from llmq_kernels.grid_search import torch_path
from llmq_kernels.grid_search.candidates import Candidates

LARGEST_GROUP = 1024  # columns that a program can hold; larger groups go through torch
STORED = (torch.float16, torch.bfloat16, torch.float32)


def search(
    groups: Tensor,
    costs: Tensor,
    first: tuple[Tensor, Tensor],
    widest: Tensor,
    zeros: Tensor,
    candidates: Candidates,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (R, G) float32 of the least error among the candidates, see above.

    Raises KernelInputError unless the arguments are as the head of this file says.
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
    """Raise KernelInputError unless `search` can take the arguments.  Values are not read."""
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
    if candidates.dtype not in STORED:
        raise KernelInputError(f"scales cannot be stored in {candidates.dtype}")
