"""Rotation: mix the channels of a head, so that no outlier channel sets the scale of its group alone.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406, its R2).  Attention
mixes tokens but not the channels of a head, so for any orthogonal R

    W_o (P V) = (W_o R) (P (Rᵀ V))          P the attention weights, V = W_v x + b_v, head by head

Both sides are folded into W_o, W_v and b_v, so there is no cost at run time.  R is a Hadamard matrix with random signs
of its rows.  Its entries are ±1/√d, so an outlier channel is spread evenly over all channels.  It exists in this form
where d is a power of two; elsewhere R is a random orthogonal matrix.

A rotation spreads outliers, but it also mixes channels that were easy to quantize.  Whether it helps depends on the
model, so it is validated like any other stage.
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
    """See `TransformStage`.  There is only one candidate, so `loss` is not used."""
    size = width()
    return repeated(orthogonal(size, SEED).to(source.device), len(source)) if size > 1 else None


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size, size) float32, determined by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1) == 0:
        signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
        return hadamard(size).mul_(signs).mul_(size**-0.5)
    Q, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    uniform: Tensor = Q * triangle.diagonal().sign()  # so that every direction is equally likely
    return uniform.to(torch.float32)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix (size, size) of ±1, float32; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
