"""Round to nearest: each weight to the closest point of its grid, blind to the inputs.

The yardstick for everything else.  The grid is min-max, or searched for the least squared error of the weights.
"""

from torch import Tensor

from llmq.algorithms import Options, Rounding
from llmq.algorithms.factor import Factor
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme

NEEDS_FACTOR = False


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: WeightScheme, options: Options, factor: Factor | None = None
) -> Rounding:
    """See `RoundingStage`; only `weight` is looked at."""
    fit = affine_grid.fit_searched if options.scales == "searched" else affine_grid.fit_minmax
    chosen = fit(weight, scheme, options.scale_dtype)
    return Rounding(chosen.quantized(chosen.encode(weight)))
