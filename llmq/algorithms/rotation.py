"""Rotation: mix the channels of a head, so that none is loud and none sets the scale of its group alone.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406, its R2).  Attention
mixes tokens and leaves the channels of a head as they are, so for any orthogonal R

    W_o (P V) = (W_o R) (P (Rᵀ V))          P the attention weights, V = W_v x + b_v, head by head

Both sides are folded into W_o, W_v and b_v, and nothing is left to do at run time.  R is a Hadamard matrix with the
signs of its rows drawn, all of whose entries are ±1/√d: a loud channel is spread over all the others alike.  It
exists in this form where d is a power of two; elsewhere R is drawn from all orthogonal matrices.

Rotating spreads what is loud, and with it also what was quiet: whether it helps depends on the model, so it is judged
like any other stage.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.numerics.block_diagonal import repeated
from llmq.numerics.input_stats import InputStats

SEED = 0


def basis(
    stats: InputStats, source: Tensor, width: Callable[[], int], loss: Callable[[Tensor], float]
) -> Tensor | None:
    """See `TransformStage`; the loss is not asked, as there is nothing to choose."""
    size = width()
    return repeated(orthogonal(size, SEED).to(source.device), len(source)) if size > 1 else None


def orthogonal(size: int, seed: int) -> Tensor:
    """An orthogonal matrix (size, size) float32, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1) == 0:
        signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
        return hadamard(size).mul_(signs).mul_(size**-0.5)
    Q, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    even: Tensor = Q * triangle.diagonal().sign()  # so that every direction is equally likely
    return even.to(torch.float32)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix (size, size) of ±1, float32; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
