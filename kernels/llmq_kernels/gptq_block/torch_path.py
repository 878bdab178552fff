"""Blocks of columns in torch, for any device: inside a block at once, behind it by one matrix product.

Nothing is read back from the device.
"""

import torch
from torch import Tensor


def round_columns(
    columns: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    levels: int,
    start: int,
    stop: int,
) -> None:
    """See `op.round_columns`; start..stop is one block, whatever its width."""
    experts = zip(columns, codes, upper, scales, zeros, group_of[:, start:stop], strict=True)
    for W, C, U, scale, zero, groups in experts:
        _round_columns(W, C, U, scale.index_select(0, groups), zero.index_select(0, groups), levels, start, stop)


def _round_columns(
    W: Tensor, codes: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, levels: int, start: int, stop: int
) -> None:
    """One expert; scales and zeros (B, N) are those of the block's columns."""
    block = W[start:stop]  # (B, N), a view
    inner = U[start:stop, start:stop]
    errors = torch.empty_like(block)
    for i, pivot in enumerate(inner.diagonal()):
        scale, zero = scales[i], zeros[i]
        code = (block[i] / scale).add_(zero).round_().clamp_(0, levels)
        codes[start + i] = code
        torch.sub(block[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(pivot)
        block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
    W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
