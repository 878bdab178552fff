"""One quantized weight, as it is in one format -> the same weight in the grid of another one.

Lossless where the other format holds these very codes: then nothing is computed but, for codes of 2 and 3 bits in a
format of 4, an offset: what a narrow grid can say, a wide one can, w = s (q - z) = s ((q + 8 - m) - (z + 8 - m)), m the
narrow grid's middle.  Otherwise the weight is rounded anew, to the nearest codes of a grid of searched scales, and what
that costs is measured.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.formats.base import Layout
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, WeightScheme

WIDE = 4  # bits of the narrowest grid of formats that do not have 2 and 3


@dataclass(frozen=True)
class Recoded:
    """A weight for another format; `error` is ‖W - Ŵ‖ / ‖W‖, None where the codes are what they were."""

    quantized: QuantizedTensor
    error: float | None = None


def recode(q: QuantizedTensor, layout: Layout, dtype: torch.dtype) -> Recoded | str:
    """The same codes for another layout with scales of `dtype`, or why it cannot hold them."""
    if q.group_index is not None:
        return (
            "its columns are grouped in an order of their own (act-order), which this format has no room for, and "
            "engines drop or refuse"
        )
    found = _held(q, layout)
    if isinstance(found, str):
        return found
    scales = found.scales.to(dtype)
    if not torch.equal(scales.to(torch.float32), found.scales.to(torch.float32)):
        wrong = int((scales.to(torch.float32) != found.scales.to(torch.float32)).sum())
        name = str(dtype).removeprefix("torch.")
        return f"{wrong} of {scales.numel()} scales are no {name} numbers, which is what readers of this format expect"
    return Recoded(dataclasses.replace(found, scales=scales))


def requantize(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Recoded:
    """The nearest codes for `weight` (N, K) float32 on another grid."""
    chosen = affine_grid.fit_searched(weight, scheme, dtype)
    q = chosen.quantized(chosen.encode(weight))
    size = float(weight.norm())
    return Recoded(q, float((weight - q.dequantize()).norm()) / size if size else 0.0)


def symmetric(q: QuantizedTensor) -> QuantizedTensor | None:
    """The same on a grid without zeros, where each of them is in the middle; otherwise None."""
    if q.zeros is None:
        return q
    if not bool((q.zeros == q.scheme.middle).all()):
        return None
    return dataclasses.replace(q, zeros=None, scheme=dataclasses.replace(q.scheme, symmetric=True))


def on_grid(q: QuantizedTensor, scheme: WeightScheme) -> QuantizedTensor | None:
    """The weight as one of `scheme`, where that is another word for its own: one group a row has two names."""
    K = q.shape[1]
    same = (q.scheme.bits, q.scheme.symmetric) == (scheme.bits, scheme.symmetric)
    if not same or q.scheme.columns_per_group(K) != scheme.columns_per_group(K):
        return None
    return dataclasses.replace(q, scheme=scheme)


def nearest(near: WeightScheme | None, layout: Layout, out_features: int, in_features: int) -> WeightScheme | None:
    """The grid of a layout for such a weight that is nearest to `near`: more bits before fewer, then other groups."""
    asked = near or WeightScheme(4, 32)
    for group_size in dict.fromkeys((asked.group_size, 128, 64, 32, 16, "channel")):
        for bits in sorted(BITS, key=lambda bits: (bits < asked.bits, abs(bits - asked.bits))):
            for without_zeros in dict.fromkeys((asked.symmetric, True)):
                scheme = WeightScheme(bits, group_size, without_zeros)
                if layout.refusal(scheme, out_features, in_features) is None:
                    return scheme
    return None


def widened_scheme(scheme: WeightScheme | None) -> WeightScheme | None:
    """A grid of 2 or 3 bits as one of 4 that holds all that it holds; None for wider ones."""
    return None if scheme is None or scheme.bits >= WIDE else dataclasses.replace(scheme, bits=WIDE)


def _held(q: QuantizedTensor, layout: Layout) -> QuantizedTensor | str:
    """The same weight with codes that the layout has room for, or why it has not."""
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
