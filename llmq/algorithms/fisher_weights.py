"""Fisher weights of calibration tokens: how much an error in a layer's output at a token raises the model's loss.

H = XᵀX / T treats an error at every token as equally bad.  It is not: with y (T, N) the outputs of a layer and ℓ the
loss of the model, an error δ at token t costs about ½ δᵀF_t δ, with F_t the Fisher information of the token's outputs.
Only the mean eigenvalue of F_t is used (GuidedQuant, Kim et al. 2025, arXiv:2505.07004, uses the same gradients):

    γ_t = Σ_i (∂ℓ/∂y_ti)²        H = Σ_t γ_t x_tᵀx_t / Σ_t γ_t        up to a factor, which nothing depends on

**Which ℓ?**  The loss to keep low is KL(float ‖ quantized).  At the float model its gradient is zero, because p is the
best prediction of p.  Its curvature is not zero.  The curvature is the Fisher information: the mean of squared
gradients of the cross-entropy over labels *drawn from the model's own p*.  (Gradients against the labels of the text
are another quantity, the empirical Fisher.  It is large where the model is wrong, whether or not the prediction
depends on the layer.)  One label is drawn per token.  γ is noisy; the sum over tokens is much less noisy.

γ has a long tail, so it is clipped at its 99.9th percentile, and only half of the weight of a token follows γ.

**Outputs of a block.**  Here F_t matters as a matrix: the loss depends on few directions of the hidden state.  One
sample per token says nothing about one token's matrix, so the directions are those of all tokens together, with g (D,)
the gradient of ℓ in the block's output, and the size is that of the token (`OutputMetric`):

    loss = Σ_t w_t δ_t M δ_tᵀ        M = SHARE Γ D / tr Γ + (1 - SHARE) I        Γ = Σ_t g_tᵀg_t
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPPED_AT = 0.999
SHARE = 0.5  # of a token's weight that follows γ
MATRIX_SHARE = 0.99  # of M that follows Γ


def drawn_slope(logits: Tensor, chances: Tensor) -> Tensor:
    """∂ℓ/∂logits = p - onehot(label), (…, V) float32, with one label per token drawn from p = softmax(logits).

    logits   (…, V)
    chances  (…,) float32 in [0, 1): the label is the first index where the cumulative sum of p exceeds this fraction
    """
    p = torch.softmax(logits.to(torch.float32), dim=-1)
    sums = p.cumsum(-1)
    drawn = torch.searchsorted(sums, chances[..., None] * sums[..., -1:], right=True).clamp_(max=p.shape[-1] - 1)
    return p.scatter_add_(-1, drawn, torch.full_like(sums[..., :1], -1))


def weights(importance: Tensor) -> Tensor:
    """The weight of each token, float32, 1 on average; `importance` is γ of all tokens, up to a factor."""
    gamma = importance.to(torch.float32)
    highest = gamma.flatten().kthvalue(max(1, math.ceil(CLIPPED_AT * gamma.numel()))).values
    clipped = gamma.clamp(max=highest)
    mean = clipped.mean(dtype=torch.float64).to(torch.float32)
    if not mean > 0:  # the layer's output does not influence the loss
        return torch.ones_like(gamma)
    return (clipped / mean).mul_(SHARE).add_(1 - SHARE)


@dataclass(frozen=True)
class OutputMetric:
    """How much an error in the output of a block costs.

    matrix   (D, D) float32, M, with a mean eigenvalue of 1
    weights  (S, T) float32, the weight of each token, 1 on average
    """

    matrix: Tensor
    weights: Tensor

    @classmethod
    def of(cls, moment: Tensor, importance: Tensor) -> "OutputMetric":
        """From Γ (D, D) float32 and γ (S, T) of the block's outputs, each up to a factor."""
        mean = moment.diagonal().mean()
        identity = torch.eye(len(moment), dtype=torch.float32, device=moment.device)
        scaled = moment / mean if mean > 0 else identity
        return cls(torch.lerp(identity, scaled, MATRIX_SHARE), weights(importance))

    def to(self, device: torch.device) -> "OutputMetric":
        return OutputMetric(self.matrix.to(device), self.weights.to(device))

    def loss(self, difference: Tensor, sequences: Sequence[int]) -> tuple[float, Tensor]:
        """The loss of `difference` (…, B, T, D) float32 in these sequences, summed, and half of its gradient."""
        gradient = (difference @ self.matrix).mul_(self.weights[list(sequences)][..., None])
        return float((gradient * difference).sum(dtype=torch.float64)), gradient
