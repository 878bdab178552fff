"""The error of layers whose weights and inputs are quantized, for the choice of a transform before both are.

    ‖ Q(W A) Q(A⁻¹ x) - W x ‖²   per token, summed over the layers that share the input x

Weights are rounded to nearest. The inputs get a scale per token, or the static scale that fits them best.
"""

from dataclasses import replace

from torch import Tensor

from llmq.algorithms import Options, rtn
from llmq.algorithms.ranges import least_error_scale
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.numerics.affine_grid import dtype_of
from llmq.numerics.block_diagonal import columns, inverse
from llmq.numerics.fake_quantize import fake_quantized
from llmq.numerics.input_histogram import InputHistogram
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.steps.run import Run


def product_loss(run: Run, block: Block, group: InputGroup, inputs: Tensor, basis: Tensor | None = None) -> float:
    """The error for the float `inputs` (..., K) of the group, in a basis A (K/d, d, d); None: the identity."""
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    weights = {path: block.weight(path) for path in group.names}
    products = {path: x @ weight.T for path, weight in weights.items()}
    if basis is not None:
        x = columns(x, inverse(basis).mT)
        weights = {path: columns(weight, basis) for path, weight in weights.items()}
    scheme = run.plans[group.names[0]].scheme.inputs
    assert scheme is not None, "the inputs are quantized"
    if scheme.scales == "static":
        histogram = InputHistogram(sum((w.square().sum(0) for w in weights.values()), x.new_zeros(x.shape[1])))
        histogram.update(x)
        scale = least_error_scale(histogram.counts, histogram.limit, dtype_of(run.options.scale_dtype), scheme.dtype)
        scheme = InputScheme(scheme.dtype, "static", scale)
    rounded, loss = fake_quantized(x, scheme), 0.0
    for path, weight in weights.items():
        quantized = _rounded(weight, run.plans[path].scheme.weights, run.options)
        loss += float((rounded @ quantized.T - products[path]).square().sum()) / max(1, len(x))
    return loss


def _rounded(weight: Tensor, grid: WeightScheme | None, options: Options) -> Tensor:
    """The weight rounded to nearest; with 8 bits without the search for scales, which takes ten times as long."""
    if grid is None:
        return weight
    if grid.bits == 8 and grid.floats is None and grid.block_type is None:
        options = replace(options, scales="minmax")
    return rtn.round_weight(weight, None, grid, options).quantized.dequantize()
