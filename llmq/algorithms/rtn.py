"""Round to nearest: each weight becomes the closest value of its grid, whatever the inputs are.

It is the baseline for all other methods.  The grid is min-max, or searched for the least squared error of the weights,
in which an importance matrix of llama.cpp can weigh the columns.
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
    """See `RoundingStage`.  Only `weight` is used, and an importance matrix if one was given."""
    if options.scales == "searched":
        chosen = affine_grid.fit_searched(weight, scheme, options.scale_dtype, options.importance)
    else:
        chosen = affine_grid.fit_minmax(weight, scheme, options.scale_dtype)
    return Rounding(chosen.quantized(chosen.encode(weight)))
