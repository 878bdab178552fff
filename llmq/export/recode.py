"""Convert one quantized weight to the grid of another format.

This is lossless if the other format can hold the quantized values. Values of 2 and 3 bits fit into 4 bits with an
offset: w = s (q - z) = s ((q + 8 - m) - (z + 8 - m)), where m is the middle of the narrow grid; those of 5 to 7 bits
fit into 8. Otherwise the
weight is re-quantized to the nearest values on a grid with searched scales, and the error is measured.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.formats.base import Layout
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, WeightScheme

WIDER = {2: 4, 3: 4, 5: 8, 6: 8, 7: 8}  # bits -> bits that every format has which has not these


@dataclass(frozen=True)
class Recoded:
    """A weight for another format; `error` is ‖W - Ŵ‖ / ‖W‖, None if the quantized values are unchanged."""

    quantized: QuantizedTensor
    error: float | None = None


def recode(q: QuantizedTensor, layout: Layout, dtype: torch.dtype) -> Recoded | str:
    """The same quantized values for another layout with scales of `dtype`, or the reason why it cannot hold them."""
    if q.group_index is not None:
        return (
            "its columns are grouped by act-order, which this format cannot store, and which engines ignore or refuse"
        )
    held = _held(q, layout)
    if isinstance(held, str):
        return held
    scales = held.scales.to(dtype)
    if not torch.equal(scales.to(torch.float32), held.scales.to(torch.float32)):
        wrong = int((scales.to(torch.float32) != held.scales.to(torch.float32)).sum())
        name = str(dtype).removeprefix("torch.")
        return f"{wrong} of {scales.numel()} scales are not exact in {name}, which this format requires"
    return Recoded(dataclasses.replace(held, scales=scales))


def requantize(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Recoded:
    """Re-quantize `weight` (N, K) float32 to the nearest values on another grid."""
    chosen = affine_grid.fit_searched(weight, scheme, dtype)
    q = chosen.quantized(chosen.encode(weight))
    size = float(weight.norm())
    return Recoded(q, float((weight - q.dequantize()).norm()) / size if size else 0.0)


def symmetric(q: QuantizedTensor) -> QuantizedTensor | None:
    """The weight on a symmetric grid, if all zero points are in the middle; otherwise None."""
    if q.zeros is None:
        return q
    if not bool((q.zeros == q.scheme.middle).all()):
        return None
    return dataclasses.replace(q, zeros=None, scheme=dataclasses.replace(q.scheme, symmetric=True))


def on_grid(q: QuantizedTensor, scheme: WeightScheme) -> QuantizedTensor | None:
    """The weight with `scheme`, if both schemes are equivalent (one group per row has two names); otherwise None."""
    K = q.shape[1]
    same = (q.scheme.bits, q.scheme.symmetric) == (scheme.bits, scheme.symmetric)
    if not same or q.scheme.columns_per_group(K) != scheme.columns_per_group(K):
        return None
    return dataclasses.replace(q, scheme=scheme)


def nearest(near: WeightScheme | None, layout: Layout, out_features: int, in_features: int) -> WeightScheme | None:
    """The grid of a layout that is nearest to `near`: prefers the same groups, then more bits over fewer."""
    wanted = near or WeightScheme(4, 32)
    for group_size in dict.fromkeys((wanted.group_size, 128, 64, 32, 16, "channel")):
        for bits in sorted(BITS, key=lambda bits: (bits < wanted.bits, abs(bits - wanted.bits))):
            for without_zeros in dict.fromkeys((wanted.symmetric, True)):
                scheme = WeightScheme(bits, group_size, without_zeros)
                if layout.refusal(scheme, out_features, in_features) is None:
                    return scheme
    return None


def widened_scheme(scheme: WeightScheme | None) -> WeightScheme | None:
    """The grid of 4 or 8 bits that holds a grid of other bits; None for grids of 4 and 8 bits."""
    return None if scheme is None or scheme.bits not in WIDER else dataclasses.replace(scheme, bits=WIDER[scheme.bits])


def _held(q: QuantizedTensor, layout: Layout) -> QuantizedTensor | str:
    """The weight with quantized values that the layout can hold, or the reason why it cannot."""
    refusal = layout.refusal(q.scheme, *q.shape)
    if refusal is None:
        return q
    wide = widened_scheme(q.scheme)
    if wide is None or layout.refusal(wide, *q.shape) is not None:
        return refusal
    shift = wide.middle - q.scheme.middle
    return dataclasses.replace(
        q, codes=q.codes + shift, zeros=None if q.zeros is None else q.zeros + shift, scheme=wide
    )
