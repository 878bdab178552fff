"""`InputStats`: running sums over the inputs of a weight, the only object in llmq that accumulates.

Let X̂ (T, K) be the recorded inputs.  H = X̂ᵀX̂ / T is their second moment: the Hessian of the layer's squared output
error, up to a factor.  mean|x| is the magnitude of each channel.  Where the inputs X (T, K) of the float model for the
same tokens are known too, D = X - X̂ is the change by the quantized layers before, and `algorithms/target.py` and
`algorithms/validation_loss.py` use C = DᵀX̂ / T and DᵀD / T.  All are sums over tokens, so batches can be added one by
one.  A token with a weight γ counts γ times.

Only the part above the diagonal is added up; it is mirrored when H is needed.  On a GPU inputs in half precision are
multiplied without conversion to float32, with and without weights (`llmq_kernels/gram/op.py`).
"""

import torch
from torch import Tensor

from llmq.distributed.ranks import Ranks
from llmq.numerics.block_diagonal import columns, inverse, rows
from llmq.numerics.input_histogram import InputHistogram
from llmq_kernels.gram import op as gram

TOKENS_AT_ONCE = 16_384


class InputStats:
    """Running sums over the inputs (T, K) of the weights that share them.

    tokens    how many tokens were added
    borrowed  how many of them were not routed to this expert; they were added because too few were (see
              `model/passes/statistics.py`)
    histogram   how large the inputs are; None unless a static scale of the inputs is needed
    largest_of_experts  input of all experts of a layer; None unless they share a scale that is measured on it
    validation  the same sums over the validation tokens, which are not counted here: nothing is fitted on them, and
              choices are made by them

    The tokens of a batch are added in units of `unit` tokens (0: all together). So a batch that arrives in parts of
    whole units gives the same bits.
    """

    def __init__(self, in_features: int, device: torch.device, *, unit: int = 0) -> None:
        self._unit = unit
        self.tokens = 0
        self.borrowed = 0
        self.histogram: InputHistogram | None = None
        self.largest_of_experts: float | None = None
        self.validation: InputStats | None = None
        self._weight = 0.0  # the sum of the tokens' weights
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)  # above the diagonal
        self._absolute = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._largest = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.judges = False  # whether this is the `validation` of another `InputStats`
        self._paired = 0  # tokens whose inputs in the float model are known
        self._cross: Tensor | None = None  # DᵀX̂, both triangles
        self._drift: Tensor | None = None  # DᵀD, above the diagonal; of validation tokens only

    def begin_validation(self) -> "InputStats":
        """Start `validation` and return it."""
        self.validation = InputStats(len(self._absolute), self._gram.device, unit=self._unit)
        self.validation.judges = True
        return self.validation

    def update(self, inputs: Tensor, originals: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add `inputs` (..., K) of any float dtype; all leading dimensions together are the tokens.

        originals  (..., K) the inputs of the weight in the float model, for the same tokens
        weights    (T,) the weight γ of each token; 1 where not given
        """
        K = inputs.shape[-1]
        X = inputs.reshape(-1, K)
        X_float = None if originals is None else originals.reshape(-1, K)
        unit = self._unit or len(X)
        for first in range(0, len(X), unit or 1):
            last = min(first + unit, len(X))
            for start in range(first, last, TOKENS_AT_ONCE):
                rows = slice(start, min(start + TOKENS_AT_ONCE, last))
                original, gamma = (None if given is None else given[rows] for given in (X_float, weights))
                self._add(X[rows], original, gamma)

    def _add(self, inputs: Tensor, originals: Tensor | None, weights: Tensor | None) -> None:
        """`inputs` and `originals` (T, K), `weights` (T,)."""
        dtype = gram.multiplied_in(inputs.dtype, on_cuda=inputs.is_cuda)
        gamma = None if weights is None else weights.to(torch.float32)
        X = inputs.to(dtype)
        gram.update(self._gram, X, gamma, upper_only=True)
        size = inputs.abs()
        self._absolute += size.sum(0, dtype=torch.float32)
        if len(size):
            self._largest = torch.maximum(self._largest, size.amax(0).to(torch.float32))
        if self.histogram is not None:
            self.histogram.update(inputs)
        self.tokens += len(inputs)
        self._weight += len(inputs) if weights is None else float(weights.sum(dtype=torch.float64))
        if originals is None:
            return
        self._paired += len(inputs)
        D = (originals.to(torch.float32) - inputs.to(torch.float32)).to(dtype)
        if self._cross is None:
            self._cross = torch.zeros_like(self._gram)
        gram.add_product(self._cross, D, X, gamma)
        if self.judges:
            self._drift = torch.zeros_like(self._gram) if self._drift is None else self._drift
            gram.update(self._drift, D, gamma, upper_only=True)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of all ranks; all ranks must call it, and have the same statistics afterwards."""
        counts = (self.tokens, self.borrowed, self._paired, self._cross is not None, self._drift is not None)
        self._weight, *totals = ranks.total(self._weight, *counts)
        self.tokens, self.borrowed, self._paired, crossed, drifted = map(int, totals)
        ranks.sum_(self._gram)
        ranks.sum_(self._absolute)
        if ranks.size > 1:
            self._largest = torch.stack(ranks.all(self._largest.cpu())).amax(0).to(self._largest.device)
        if crossed:
            self._cross = ranks.sum_(torch.zeros_like(self._gram) if self._cross is None else self._cross)
        if drifted:
            self._drift = ranks.sum_(torch.zeros_like(self._gram) if self._drift is None else self._drift)
        if self.histogram is not None:
            self.histogram.sum_over(ranks)
        if self.validation is not None:
            self.validation.sum_over(ranks)

    def second_moment(self) -> Tensor:
        """(K, K) float32, H = X̂ᵀX̂ / T; every call returns a new tensor."""
        gram.mirror(self._gram)
        return self._gram / self._count

    def cross_moment(self) -> Tensor | None:
        """(K, K) float32, C = (X - X̂)ᵀX̂ / T; None unless the float model's inputs are known for every token."""
        if self._cross is None or self._paired != self.tokens:
            return None
        return self._cross / self._count

    def drift_moment(self) -> Tensor | None:
        """(K, K) float32, (X - X̂)ᵀ(X - X̂) / T; None unless the float model's inputs are known for every token.

        It is computed for `validation` only.
        """
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
        """(K,) float32, mean |x| of each channel; the weights of the tokens are ignored."""
        return self._absolute / max(1, self.tokens)

    @property
    def largest(self) -> Tensor:
        """(K,) float32, the largest |x| of each channel."""
        return self._largest

    @property
    def _count(self) -> float:
        return self._weight or 1.0

    def in_basis(self, basis: Tensor) -> "InputStats":
        """The statistics of A⁻¹ x, the inputs of weights W A; see `llmq/numerics/block_diagonal.py`.

        mean |x| and the largest |x| of mixed channels cannot be computed from the sums; the root of their mean square,
        and four times the root, take their places.
        """
        into = inverse(basis)
        gram.mirror(self._gram)
        if self._drift is not None:
            gram.mirror(self._drift)

        def both_sides(moment: Tensor) -> Tensor:
            return rows(into, columns(moment, into.mT))

        stats = InputStats(len(self._absolute), self._gram.device)
        stats.tokens, stats.borrowed, stats._weight = self.tokens, self.borrowed, self._weight
        stats.judges, stats._paired = self.judges, self._paired
        stats._gram = both_sides(self._gram)
        stats._cross = None if self._cross is None else both_sides(self._cross)
        stats._drift = None if self._drift is None else both_sides(self._drift)
        mixed = basis.shape[-1] > 1
        stats._absolute = stats.mean_square.sqrt() * self.tokens if mixed else self._absolute / basis.flatten()
        stats._largest = 4 * stats.mean_square.sqrt() if mixed else self._largest / basis.flatten().abs()
        stats.validation = None if self.validation is None else self.validation.in_basis(basis)
        return stats
