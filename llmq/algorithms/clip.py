"""Round to nearest, with ranges clipped according to the inputs of the weight.

The second half of AWQ (Lin et al. 2023, arXiv:2306.00978, section 3).  A weight with large inputs matters more, so the
range of each group is chosen to lower  sum_j E[x_j²] (w_j - ŵ_j)², the output error if inputs were uncorrelated.  GPTQ
falls back to it when a Hessian cannot be factored.  Without statistics, or with inputs that were all zero or
overflowed, it is plain RTN.
"""

import math

from torch import Tensor

from llmq.algorithms import Options, Rounding, rtn
from llmq.algorithms.factor import Factor
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme

NEEDS_FACTOR = False


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: WeightScheme, options: Options, factor: Factor | None = None
) -> Rounding:
    """See `RoundingStage`."""
    if stats is None or options.scales == "minmax":
        return rtn.round_weight(weight, stats, scheme, options)
    mean = float(stats.mean_square.mean())
    if not 0 < mean < math.inf:
        return rtn.round_weight(weight, stats, scheme, options)
    floor = 1e-6 * mean  # channels that were zero in calibration still count a little
    chosen = affine_grid.fit_searched(weight, scheme, options.scale_dtype, stats.mean_square + floor)
    return Rounding(chosen.quantized(chosen.encode(weight)))
