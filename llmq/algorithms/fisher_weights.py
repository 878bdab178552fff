"""How much each calibration token counts: what an error in a layer's output costs the model's loss there.

H = XᵀX / T takes an error at one token to be as bad as at another.  It is not: with y (T, N) a layer's outputs and ℓ
the model's loss, an error δ at token t costs about ½ δᵀF_t δ, F_t the Fisher information of the token's outputs.  Of
F_t no more is kept than its mean eigenvalue (GuidedQuant, Kim et al. 2025, arXiv:2505.07004, takes the same gradients),

    γ_t = Σ_i (∂ℓ/∂y_ti)²        H = Σ_t γ_t x_tᵀx_t / Σ_t γ_t        up to a factor, which nothing depends on

**Which ℓ?**  The loss that is to stay low is KL(float ‖ quantized), and at the float model its gradient is zero: there
is no better prediction of p than p.  Its curvature is not, and that is the Fisher information: the mean of squared
gradients of the cross-entropy over labels *drawn from the model's own p*.  (Gradients against the labels of the text
are another quantity, the empirical Fisher: large where the model is wrong, whether or not its prediction depends on
the layer.)  One label is drawn for each token; γ is noisy, the sum over tokens much less so.

γ has a long tail, so it is clipped at its 99.9th percentile, and half of every token's weight is left as it was.
"""

import math

import torch
from torch import Tensor

CLIPPED_AT = 0.999
SHARE = 0.5  # of a token's weight that follows γ


def drawn_slope(logits: Tensor, chances: Tensor) -> Tensor:
    """∂ℓ/∂logits = p - onehot(label), (…, V) float32, for a label of each token that is drawn from p = softmax(logits).

    logits   (…, V)
    chances  (…,) float32 in [0, 1): the label is where the sum of p first exceeds this part of the whole
    """
    p = torch.softmax(logits.to(torch.float32), dim=-1)
    sums = p.cumsum(-1)
    drawn = torch.searchsorted(sums, chances[..., None] * sums[..., -1:], right=True).clamp_(max=p.shape[-1] - 1)
    return p.scatter_add_(-1, drawn, torch.full_like(sums[..., :1], -1))


def weights(importance: Tensor) -> Tensor:
    """How much each token counts, float32, 1 on average; `importance` is γ of all tokens, up to a factor."""
    gamma = importance.to(torch.float32)
    highest = gamma.flatten().kthvalue(max(1, math.ceil(CLIPPED_AT * gamma.numel()))).values
    clipped = gamma.clamp(max=highest)
    mean = clipped.mean(dtype=torch.float64).to(torch.float32)
    if not mean > 0:  # the layer's output reaches nothing
        return torch.ones_like(gamma)
    return (clipped / mean).mul_(SHARE).add_(1 - SHARE)
