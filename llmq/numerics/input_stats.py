"""`InputStats`: what a weight's inputs looked like, the only thing in llmq that grows.

With X̂ (T, K) the inputs that were seen, H = X̂ᵀX̂ / T is the second moment (the Hessian of the layer's squared output
error, up to a factor) and mean|x| the scale of each channel.  Where the float model's inputs X (T, K) for the same
tokens are known too, D = X - X̂ is how far the rounded layers before have moved them, and C = DᵀX̂ / T and DᵀD / T
are what `algorithms/target.py` and `algorithms/guard.py` ask for.  All are sums over tokens, so batches add up.  A
token with a weight γ counts γ times.

Only what is above the diagonal is added up; it is mirrored when somebody asks for H.  On a GPU inputs in half precision
are multiplied as they are.
"""

import torch
from torch import Tensor

from llmq.numerics.block_diagonal import columns, inverse, rows
from llmq_kernels.gram import op as gram

TOKENS_AT_ONCE = 16_384


class InputStats:
    """Running sums over the inputs (T, K) of the weights that share them.

    `held_out` is the same over tokens that are not counted here: nothing is fitted on them, choices are judged by them.
    Of the `tokens`, so many as `borrowed` says are not the weights' own: see `model/passes/statistics.py` on starved
    experts.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.borrowed = 0
        self.held_out: InputStats | None = None
        self._weight = 0.0  # the sum of the tokens' weights
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)  # above the diagonal
        self._absolute = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.judges = False  # whether it is the `held_out` of another
        self._paired = 0  # tokens whose original is known
        self._cross: Tensor | None = None  # DᵀX̂, whole
        self._drift: Tensor | None = None  # DᵀD, above the diagonal; of judges only

    def hold_out(self) -> "InputStats":
        """Begin `held_out`, and return it."""
        self.held_out = InputStats(len(self._absolute), self._gram.device)
        self.held_out.judges = True
        return self.held_out

    def update(self, inputs: Tensor, originals: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add `inputs` (..., K) of any float dtype; every leading dimension is a token.

        originals  (..., K) what the float model feeds the weight for the same tokens
        weights    (T,) how much each token counts; 1 where not given
        """
        K = inputs.shape[-1]
        X = inputs.reshape(-1, K).split(TOKENS_AT_ONCE)
        theirs = (None,) * len(X) if originals is None else originals.reshape(-1, K).split(TOKENS_AT_ONCE)
        counts = (None,) * len(X) if weights is None else weights.split(TOKENS_AT_ONCE)
        for chunk, original, count in zip(X, theirs, counts, strict=True):
            self._add(chunk, original, count)

    def _add(self, inputs: Tensor, originals: Tensor | None, weights: Tensor | None) -> None:
        """All of (T, K), the weights (T,)."""
        exact = inputs.is_cuda and inputs.dtype in gram.HALVES and weights is None
        dtype = inputs.dtype if exact else torch.float32
        roots = None if weights is None else weights.to(torch.float32).sqrt()[:, None]  # so that products have weight γ
        X = _weighted(inputs.to(dtype), roots)
        gram.update(self._gram, X, upper_only=True)
        self._absolute += inputs.abs().sum(0, dtype=torch.float32)
        self.tokens += len(inputs)
        self._weight += len(inputs) if weights is None else float(weights.sum(dtype=torch.float64))
        if originals is None:
            return
        self._paired += len(inputs)
        D = _weighted((originals.to(torch.float32) - inputs.to(torch.float32)).to(dtype), roots)
        if self._cross is None:
            self._cross = torch.zeros_like(self._gram)
        gram.add_product(self._cross, D, X)
        if self.judges:
            self._drift = torch.zeros_like(self._gram) if self._drift is None else self._drift
            gram.update(self._drift, D, upper_only=True)

    def second_moment(self) -> Tensor:
        """(K, K) float32, H = X̂ᵀX̂ / T; made anew by each call."""
        gram.mirror(self._gram)
        return self._gram / self._count

    def cross_moment(self) -> Tensor | None:
        """(K, K) float32, C = (X - X̂)ᵀX̂ / T; None unless the original of every token is known."""
        if self._cross is None or self._paired != self.tokens:
            return None
        return self._cross / self._count

    def drift_moment(self) -> Tensor | None:
        """(K, K) float32, (X - X̂)ᵀ(X - X̂) / T, for `held_out` alone; None unless every original is known."""
        if self._drift is None or self._paired != self.tokens:
            return None
        gram.mirror(self._drift)
        return self._drift / self._count

    @property
    def mean_square(self) -> Tensor:
        """(K,) float32, the diagonal of the Hessian."""
        return self._gram.diagonal() / self._count

    @property
    def mean_absolute(self) -> Tensor:
        """(K,) float32, mean |x| of each channel, whatever the tokens' weights."""
        return self._absolute / max(1, self.tokens)

    @property
    def _count(self) -> float:
        return self._weight or 1.0

    def in_basis(self, basis: Tensor) -> "InputStats":
        """The statistics of A⁻¹ x: what weights W A are fed; see `llmq/numerics/block_diagonal.py`.

        No sum tells mean |x| of channels that were mixed; the root of their mean square stands in.
        """
        into = inverse(basis)
        gram.mirror(self._gram)
        if self._drift is not None:
            gram.mirror(self._drift)

        def both_sides(moment: Tensor) -> Tensor:
            return rows(into, columns(moment, into.mT))

        found = InputStats(len(self._absolute), self._gram.device)
        found.tokens, found.borrowed, found._weight = self.tokens, self.borrowed, self._weight
        found.judges, found._paired = self.judges, self._paired
        found._gram = both_sides(self._gram)
        found._cross = None if self._cross is None else both_sides(self._cross)
        found._drift = None if self._drift is None else both_sides(self._drift)
        mixed = basis.shape[-1] > 1
        found._absolute = found.mean_square.sqrt() * self.tokens if mixed else self._absolute / basis.flatten()
        found.held_out = None if self.held_out is None else self.held_out.in_basis(basis)
        return found


def _weighted(X: Tensor, roots: Tensor | None) -> Tensor:
    return X if roots is None else X * roots
