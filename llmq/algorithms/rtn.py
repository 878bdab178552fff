"""Round to nearest: each weight to the closest point of its grid, blind to the inputs.

The yardstick for everything else.  The grid is min-max, or searched for the least squared error of the weights.
"""

from torch import Tensor

from llmq import grid
from llmq.algorithms import Factor, Options, Rounding
from llmq.config import Scheme
from llmq.stats import InputStats


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, options: Options, factor: Factor | None = None
) -> Rounding:
    """See `RoundingStage`; only `weight` is looked at."""
    fit = grid.fit_searched if options.scales == "searched" else grid.fit_minmax
    chosen = fit(weight, scheme, options.scale_dtype)
    return Rounding(chosen.quantized(chosen.encode(weight)))
