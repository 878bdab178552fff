"""How much each calibration token counts in the statistics of each layer, taken from the float model before any block.

    windows ─► float model ─► logits ─► a label drawn for each token ─► back ─► γ of each layer and token ─► weights

One pass forward and back over the text.  Nothing of it is kept: a run that is continued computes the same once more,
because the labels are drawn from numbers that belong to the seed and to the window, and what fits into memory at once
changes no bit.

Not here: why these weights (algorithms/fisher_weights.py), the way through the blocks
(model/passes/squared_gradients.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq import memory
from llmq.algorithms import fisher_weights
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.squared_gradients import squared_gradients
from llmq.model.passes.statistics import TokenWeights
from llmq.steps.kl_loss import Part, through_the_head

MEMORY_SHARE = 4  # of what is free, the part that hidden states may take


def measure(skeleton: Skeleton, windows: Tensor, seed: int) -> TokenWeights:
    """Run the float model over `windows` (S, T) int64, there and back; its blocks hold no weights before and after."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(windows.shape, generator=generator)

    def slope(chosen: Tensor, hidden: Tensor) -> Tensor:
        return drawn_slope(skeleton, windows[chosen], hidden, chances[chosen])

    batch = max(1, memory.TOKENS_PER_BATCH_TO_WEIGH // windows.shape[1])
    at_once = memory.spare(skeleton.device) // (MEMORY_SHARE * _state_bytes(skeleton, windows))
    gamma = squared_gradients(skeleton, windows, slope, batch=batch, at_once=max(batch, at_once))
    return lambda paths: _shared(gamma, paths)


def drawn_slope(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, chances: Tensor) -> Tensor:
    """The gradient in `hidden` (…, B, T, D) of the summed cross-entropy against labels drawn from the model itself."""

    def slope(logits: Tensor, part: Part) -> Tensor:
        return fisher_weights.drawn_slope(logits, chances[part].to(logits.device))

    return through_the_head(skeleton, tokens, hidden, slope)


def _shared(gamma: Mapping[str, Tensor], paths: Sequence[str]) -> Tensor | None:
    if not all(path in gamma for path in paths):
        return None
    return fisher_weights.weights(torch.stack([gamma[path] for path in paths]).sum(0))


def _state_bytes(skeleton: Skeleton, windows: Tensor) -> int:
    """Of one window: its hidden states in front of all blocks, and behind them."""
    return (len(skeleton.blocks) + 1) * skeleton.record(0, windows[:1]).hidden.nbytes
