"""KL(p ‖ q) per token in nats over the whole vocabulary: how far a quantized model (q) is from the float model (p).

    KL = Σ p (log p - log q)        ∂KL/∂logits_q = q - p

A vocabulary entry to which the float model gives probability 0 adds nothing, whatever its q is.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(…,) from log-probabilities (…, V), in their dtype."""
    return _mean_difference(log_p.exp(), log_p, log_q)


@torch.no_grad()
def kl_and_gradient(logits_p: Tensor, logits_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL (…,) and its gradient (…, V) in `logits_q`, both float32, from logits (…, V) of any dtype."""
    log_p = torch.log_softmax(logits_p.to(torch.float32), dim=-1)
    log_q = torch.log_softmax(logits_q.to(torch.float32), dim=-1)
    p = log_p.exp()
    return _mean_difference(p, log_p, log_q), log_q.exp_().sub_(p)


def _mean_difference(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p - log_q).masked_fill_(log_p == -math.inf, 0).mul_(p).sum(-1)
