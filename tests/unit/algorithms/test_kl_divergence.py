"""The KL divergence and its gradient compared with torch's."""

import torch
from torch import Tensor

from llmq.algorithms.kl_divergence import kl_and_gradient, kl_divergence


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_value_and_gradient_are_those_of_torch() -> None:
    expected, predicted = random(3, 5, 11), random(3, 5, 11, seed=1).requires_grad_(True)
    expected[..., 2] = -torch.inf  # a token with probability 0
    target = torch.log_softmax(expected, -1)
    assumed = torch.log_softmax(predicted, -1)
    slow = torch.nn.functional.kl_div(assumed, target, reduction="none", log_target=True).nan_to_num(0).sum(-1)
    finite = expected != -torch.inf
    explicit = torch.where(finite, target.exp() * (torch.where(finite, target, 0) - assumed), 0).sum(-1)
    (slope,) = torch.autograd.grad(explicit.sum(), predicted)
    loss, gradient = kl_and_gradient(expected, predicted.detach())
    torch.testing.assert_close(loss, slow.detach())
    torch.testing.assert_close(gradient, slope)
    assert (loss > 0).all()


def test_the_value_alone_has_the_same_bits() -> None:
    p, q = random(3, 5, 11), random(3, 5, 11, seed=1)
    p[..., 2] = q[..., 2] = -torch.inf  # a token with probability 0 in both models
    loss, _ = kl_and_gradient(p, q)
    assert torch.equal(kl_divergence(p.log_softmax(-1), q.log_softmax(-1)), loss)
    assert torch.isfinite(loss).all()
