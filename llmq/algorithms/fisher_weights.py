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
"""

import math

import torch
from torch import Tensor

CLIPPED_AT = 0.999
SHARE = 0.5  # of a token's weight that follows γ


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
