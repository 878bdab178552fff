"""KL(float ‖ quantized) over the whole vocabulary, from the last hidden states of both models.

Both models have the same head, in 16 bits or more, so only hidden states of the float model are stored. Logits are
computed for a few tokens at a time, because everything after the blocks (a norm, the head, a soft cap) works per token.
"""

from collections.abc import Callable, Iterator
from types import EllipsisType

import torch
from torch import Tensor

from llmq.algorithms.kl_divergence import kl_and_gradient
from llmq.model.build.skeleton import Skeleton

# Entries of logits at once, of which there are about six float32 copies: 0.4 GB, 3.2 GB on CUDA, where each part costs
# a pass through the code of the whole model. Independent of the free memory, so results are reproducible.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # by device type

Part = tuple[slice, slice]  # rows and columns of tokens (B, T)
States = tuple[EllipsisType, slice, slice, slice]  # the index of their hidden states (…, B, T, D)


def logits_at_once(device: torch.device) -> int:
    """Entries of logits that are computed at once."""
    return LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cpu"])


def kl_loss(skeleton: Skeleton, tokens: Tensor, expected: Tensor, hidden: Tensor) -> tuple[float, Tensor]:
    """The mean over all tokens in nats, and its gradient (…, B, T, D) with respect to `hidden`, up to a factor.

    The factor is 1, except in float16, which rounds most entries of such a gradient to zero: there it is that of the
    sum over all tokens. Adam's steps do not depend on the factor.

    tokens    (B, T) int64
    expected  (…, B, T, D) the last hidden states of the float model
    hidden    (…, B, T, D) the last hidden states of the quantized model
    """
    total, count = 0.0, 1 if hidden.dtype == torch.float16 else tokens.numel()

    def slope(predicted: Tensor, part: Part) -> Tensor:
        nonlocal total
        with torch.no_grad():
            target = skeleton.logits(tokens[part], expected[_states(part)])
        losses, in_logits = kl_and_gradient(target, predicted)
        total += float(losses.sum(dtype=torch.float64))
        return in_logits.div_(count)

    gradient = through_the_head(skeleton, tokens, hidden, slope)
    return total / tokens.numel(), gradient


def through_the_head(
    skeleton: Skeleton, tokens: Tensor, hidden: Tensor, slope: Callable[[Tensor, Part], Tensor]
) -> Tensor:
    """The gradient of a loss with respect to `hidden` (…, B, T, D), the last hidden states for `tokens` (B, T).

    `slope` maps the logits (…, V) of a part of the tokens to the gradient of the loss with respect to these logits.
    """
    gradient = torch.empty_like(hidden)
    for part in _parts(tokens, max(1, logits_at_once(skeleton.device) // skeleton.vocabulary)):
        leaf = hidden[_states(part)].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = skeleton.logits(tokens[part], leaf)
        (gradient_of_part,) = torch.autograd.grad(logits, leaf, slope(logits.detach(), part).to(logits.dtype))
        gradient[_states(part)] = gradient_of_part
    return gradient


def _states(part: Part) -> States:
    return (..., *part, slice(None))


def _parts(tokens: Tensor, at_once: int) -> Iterator[Part]:
    """Rows and columns of parts of `tokens` (B, T) with at most `at_once` tokens: whole sequences, or pieces of one."""
    B, T = tokens.shape
    height, width = max(1, at_once // T), min(T, at_once)
    for row in range(0, B, height):
        for column in range(0, T, width):
            yield slice(row, row + height), slice(column, column + width)
