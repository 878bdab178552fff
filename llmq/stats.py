"""`InputStats`: what a weight's inputs looked like, the only thing in llmq that grows.

With X (T, K) the inputs that were seen, H = XᵀX / T is the second moment (the Hessian of the layer's squared output
error, up to a factor) and mean|x| the scale of each channel.  Both are sums over tokens, so batches add up.

Only what is above the diagonal is added up; it is mirrored when somebody asks for H.  On a GPU inputs in half precision
are multiplied as they are.
"""

import torch
from torch import Tensor

from llmq_kernels.gram import op as gram

TOKENS_AT_ONCE = 16_384


class InputStats:
    """Running sums over the inputs (T, K) of the weights that share them."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)  # above the diagonal
        self._absolute = torch.zeros(in_features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add `inputs` (..., K) of any float dtype; every leading dimension is a token."""
        for chunk in inputs.reshape(-1, inputs.shape[-1]).split(TOKENS_AT_ONCE):
            if not (chunk.is_cuda and chunk.dtype in gram.HALVES):
                chunk = chunk.to(torch.float32)
            gram.update(self._gram, chunk, upper_only=True)
            self._absolute += chunk.abs().sum(0, dtype=torch.float32)
            self.tokens += len(chunk)

    @property
    def hessian(self) -> Tensor:
        """(K, K) float32, XᵀX / T."""
        gram.mirror(self._gram)
        return self._gram / max(1, self.tokens)

    @property
    def mean_square(self) -> Tensor:
        """(K,) float32, the diagonal of the Hessian."""
        return self._gram.diagonal() / max(1, self.tokens)

    @property
    def mean_absolute(self) -> Tensor:
        """(K,) float32, mean |x| of each channel."""
        return self._absolute / max(1, self.tokens)

    def divided_by(self, scales: Tensor) -> "InputStats":
        """The statistics of x / scales, `scales` (K,): what the weights see after a folding."""
        divided = InputStats(len(scales), scales.device)
        divided.tokens = self.tokens
        divided._gram = self._gram / (scales[:, None] * scales[None, :])
        divided._absolute = self._absolute / scales
        return divided
