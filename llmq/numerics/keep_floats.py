"""Take over the grid of floats that a weight already lies on, fp8 or mxfp4, as `keep_grid.py` does for integers.

    w = scale * value        scale of a row, a number of the file (fp8), or of 32 columns, a power of two (mxfp4)

The largest weight of a group is tried on each value of the highest octave: with half of the scale, all values of a
group are twice as large, and the file has these, too.  So the codes may differ from those of the origin by an octave;
weights never do.  Weights on nvfp4 are not recognized: fused layers must share a global scale, which a layer that has
changed would choose for itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq.numerics import float_grid
from llmq.numerics.affine_grid import ScaleDtype, dtype_of
from llmq.numerics.existing_grid import SAMPLED, sample
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import encode, value_table
from llmq_kernels.value_tables import E4M3

RECOGNIZED = ("fp8", "mxfp4")


def keep_floats(
    weight: Tensor, stored: torch.dtype, scheme: WeightScheme, values: ScaleDtype
) -> QuantizedTensor | None:
    """The weight (N, K) float32 on fp8 or mxfp4; None unless it is equal, bit for bit, in the dtype `stored`.

    values  the values that the file has for scales of fp8
    """
    if scheme.floats not in RECOGNIZED or weight.shape[1] % scheme.columns_per_group(weight.shape[1]):
        return None
    if _on_grid(sample(weight, SAMPLED), stored, scheme, values) is None:
        return None
    return _on_grid(weight, stored, scheme, values)


def _on_grid(weight: Tensor, stored: torch.dtype, scheme: WeightScheme, values: ScaleDtype) -> QuantizedTensor | None:
    K = weight.shape[1]
    groups = weight.unflatten(1, (-1, scheme.columns_per_group(K)))  # (N, G, g)
    scales, open_ = groups.new_ones(groups.shape[:2]), torch.ones_like(groups[..., 0], dtype=torch.bool)
    for candidate in _candidates(groups.abs().amax(-1), scheme, values):
        chosen = torch.where(open_, candidate, scales)
        restored = _quantized(weight, chosen, scheme).dequantize().unflatten(1, groups.shape[1:])
        same = (restored.to(stored).to(torch.float32) == groups).all(-1) & open_
        scales, open_ = torch.where(same, chosen, scales), open_ & ~same
        if not bool(open_.any()):
            return _quantized(weight, scales if scheme.few_scales else scales.to(dtype_of(values)), scheme)
    return None


def _quantized(weight: Tensor, scales: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    table = value_table(scheme)
    assert table is not None, "codes of a grid of floats stand for values"
    return QuantizedTensor(encode(weight, scales, table), scales, None, scheme)


def _candidates(largest: Tensor, scheme: WeightScheme, values: ScaleDtype) -> Iterator[Tensor]:
    """Scales (N, G) that put the `largest` weights on a value of the highest octave."""
    if scheme.floats == "mxfp4":
        exponent = torch.frexp(largest).exponent - 1 - 2  # of the largest weight, minus that of 4
        lowest, highest = float_grid.LOWEST_EXPONENT, float_grid.HIGHEST_EXPONENT
        yield torch.ldexp(torch.ones_like(largest), exponent.clamp(lowest, highest))
        return
    dtype = dtype_of(values)
    smallest = torch.finfo(dtype).tiny
    for magnitude in E4M3.values(torch.arange(E4M3.largest, E4M3.zero, -1)).tolist():
        if 2 * magnitude <= E4M3.top:
            return
        nearest = (largest / magnitude).clamp_min(smallest).to(dtype)
        numbers = nearest.view(torch.int32 if dtype == torch.float32 else torch.int16)
        for step in (0, 1, -1):  # the largest weight was rounded, too
            yield (numbers + step).view(dtype).to(torch.float32)
