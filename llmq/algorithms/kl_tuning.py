"""Tune codes and scales end to end: quantization-aware training that moves only quantized values and scales.

The loss is KL(float ‖ quantized) over the whole vocabulary, so its gradient G = ∂L/∂Ŵ (N, K) comes from a pass
through the whole model.  This file handles one weight and its G.  With q₀, s₀, z the codes (quantized values), scales
and zero points of a quantized weight, v (N, K) and θ (N, G) are tuned:

    ŵ = s (q - z),    q = clip(round(q₀ + v)),    s = s₀ (1 + θ), rounded to the dtype that the file stores

Gradients pass straight through both roundings (Bengio et al. 2013, arXiv:1308.3432), as in learned step sizes (Esser et
al. 2020, arXiv:1902.08153):

    ∂L/∂v = G s        ∂L/∂θ = Σ over the group of  G (q - z) s₀

but not out of the range of the codes: a clipped v is not pushed further.  The optimizer is Adam (Kingma & Ba 2015,
arXiv:1412.6980) with β = 0.9, 0.95; its rates rise over ten steps and then fall linearly to zero.

v starts at the offset of the float weight from its quantized value, in steps of the scale, or at 0 if the float weight
is not known.  Step 0 is exactly the given codes.  The float weight does not move; the result is codes and scales only.

In a grid that is not uniform codes are places in ascending order, and ∂ŵ/∂v is s times the distance to the next value.

In a two-level grid (`quantized_tensor.Superblocks`) θ stretches its real numbers, d and dmin of each superblock.  Its
small integers do not change.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from llmq.algorithms import fused_step
from llmq.numerics import affine_grid, float_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.value_table import value_table
from llmq_kernels.tuning_step.rates import EPSILON, MEAN_DECAY, SQUARE_DECAY

WARM_UP = 10  # steps
PARTS = ("rounding", "scales")  # of a state
Dtypes = tuple[torch.dtype, torch.dtype]  # of tuned values, and of Adam's means for them
FULL: Dtypes = (torch.float32, torch.float32)  # 12 bytes per value
SHORT: Dtypes = (torch.float16, torch.bfloat16)  # 6 bytes per value
EDGE = 0.49  # largest |v| at the start; at half a step rounding could go either way


@dataclass
class Moving:
    """Values that are tuned, with Adam's running means of their gradient and of its square, of one shape.

    They are stored in the given dtypes, and updated in float32.
    """

    value: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def at(cls, value: Tensor, dtypes: Dtypes) -> "Moving":
        """Start at `value`, which is stored in the first dtype; the means are stored in the second.

        All are contiguous: Adam's fused kernel ignores strides.
        """
        value = value.contiguous()
        mean, square = (torch.zeros_like(value, dtype=dtypes[1]) for _ in range(2))
        return cls(value.to(dtypes[0]), mean, square)

    def descend(self, gradient: Tensor, rate: float, step: int) -> None:
        """One step of Adam, the first is number 0; `gradient` is float32 and contiguous."""
        stored = self.parts
        value, mean, square = (part.to(torch.float32) for part in stored)  # the stored tensors if they are float32
        adam(
            [value], [gradient], [mean], [square], [], [torch.full((), float(step), device=value.device)],
            lr=rate, beta1=MEAN_DECAY, beta2=SQUARE_DECAY, eps=EPSILON,
            amsgrad=False, weight_decay=0.0, maximize=False, fused=True,
        )  # fmt: skip
        for part, updated in zip(stored, (value, mean, square), strict=True):
            if part is not updated:
                part.copy_(updated)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.mean, self.square


@dataclass
class State:
    """One weight while it is tuned: `rounding` is v (N, K), `scales` is θ; None where that part is not tuned.

    θ is (N, G), or (N, S) for d and then (N, S) for dmin in a two-level grid, concatenated.
    """

    origin: QuantizedTensor
    rounding: Moving | None
    scales: Moving | None


@dataclass(frozen=True)
class Rates:
    """Step sizes of v and θ; with 0 that part is not tuned."""

    rounding: float
    scales: float

    def at(self, step: int, steps: int) -> "Rates":
        """The rates of step number `step`, counted from 0: they rise at first and then fall to zero."""
        factor = min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        return Rates(self.rounding * factor, self.scales * factor)


def start(quantized: QuantizedTensor, reference: Tensor | None, rates: Rates, dtypes: Dtypes = FULL) -> State:
    """The first state of `quantized`; `reference` (N, K) float32 is the float weight, if known; v has these
    `dtypes`.
    """
    rounding = scales = None
    if rates.rounding:
        v = torch.zeros(quantized.shape, device=quantized.codes.device)
        if reference is not None:
            units = quantized.scales.to(torch.float32)
            units = units.masked_fill(units == 0, 1.0)  # of groups of zeros in IQ4_NL and IQ4_XS
            v = _places(quantized, reference / units[:, quantized.column_groups()]) - quantized.codes
            v.clamp_(-EDGE, EDGE)
        rounding = Moving.at(v, dtypes)
    if rates.scales and quantized.scheme.rows_per_scale == 1:  # the rows of a block must keep one scale
        shape = quantized.scales.shape if quantized.superblocks is None else quantized.superblocks.shared().shape
        scales = Moving.at(torch.zeros(shape, device=quantized.codes.device), FULL)
    return State(quantized, rounding, scales)


def quantized(origin: QuantizedTensor, v: Tensor | None, theta: Tensor | None) -> QuantizedTensor:
    """`origin` with codes moved by v (N, K) and scales stretched by θ, both rounded as they are stored."""
    codes, scales = origin.codes, origin.scales
    if v is not None:
        codes = (v.to(torch.float32) + origin.codes).round_().clamp_(0, origin.scheme.levels).to(torch.uint8)
    if origin.superblocks is not None:
        stretched = origin.superblocks if theta is None else origin.superblocks.stretched(1 + theta)
        return QuantizedTensor.of_superblocks(codes, stretched, origin.scheme)
    if theta is not None and origin.scheme.few_scales:
        scales = float_grid.storable(origin.scales * (1 + theta), origin.scheme, origin.shared)
    elif theta is not None:
        scales = _stored(origin.scales, 1 + theta)
    return dataclasses.replace(origin, codes=codes, scales=scales)


def result(state: State) -> QuantizedTensor:
    """The weight with the current codes and scales of the state."""
    v, theta = (None if moving is None else moving.value for moving in (state.rounding, state.scales))
    return quantized(state.origin, v, theta)


def advance(state: State, gradient: Tensor, divisor: float, rates: Rates, step: int) -> tuple[QuantizedTensor, Tensor]:
    """As `update`, with `gradient` / `divisor`; returns the weight after the step, and its values (N, K)."""
    if state.rounding is not None and state.scales is None and fused_step.takes(state.origin):
        return fused_step.advance(state.origin, state.rounding.parts, gradient, divisor, rates.rounding, step)
    update(state, gradient.to(torch.float32) / divisor, rates, step)  # float16 could not hold the quotient
    weight = result(state)
    return weight, weight.dequantize()


def update(state: State, gradient: Tensor, rates: Rates, step: int) -> None:
    """One step, in place, against the gradient (N, K) of the loss at the weight `result(state)`.

    Entries that are not finite count as 0, because Adam would never forget them.
    """
    if state.rounding is not None and fused_step.takes(state.origin):
        theta = None if state.scales is None else state.scales.value
        scales = quantized(state.origin, None, theta).scales
        slope = fused_step.update(state.origin, scales, state.rounding.parts, gradient, rates.rounding, step)
        if state.scales is not None:
            state.scales.descend(slope, rates.scales, step)
        return
    G = torch.nan_to_num(gradient.to(torch.float32), 0.0, 0.0, 0.0).contiguous()
    v, theta = (None if moving is None else moving.value for moving in (state.rounding, state.scales))
    of_rounding, of_scales = slopes(state.origin, v, theta, G)
    if state.scales is not None and of_scales is not None:
        state.scales.descend(of_scales, rates.scales, step)
    if state.rounding is not None and of_rounding is not None:
        state.rounding.descend(of_rounding, rates.rounding, step)


def slopes(
    origin: QuantizedTensor, v: Tensor | None, theta: Tensor | None, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂v (N, K) and ∂L/∂θ, both float32, from the gradient (N, K) float32 at `quantized(origin, v, theta)`.

    None for a part that is None.
    """
    current = quantized(origin, v, theta) if theta is not None else origin
    of_scales = None if theta is None else _slope_of_scales(origin, current.codes, gradient)
    if v is None:
        return None, of_scales
    of_rounding = _times_by_group(gradient, current.scales.to(torch.float32), origin)
    place = v + origin.codes.to(torch.float32)  # before rounding
    outside = place.sub_(place.clamp(0, origin.scheme.levels))  # positive above the range of the codes
    of_rounding.masked_fill_(outside.mul_(of_rounding) < 0, 0)
    if (table := value_table(origin.scheme)) is not None:
        of_rounding *= table.distances(v + origin.codes.to(torch.float32))
    return of_rounding, of_scales


def tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state that have to be stored in addition to its origin, by name."""
    by_name: dict[str, Tensor] = {}
    for part, moving in zip(PARTS, (state.rounding, state.scales), strict=True):
        if moving is not None:
            by_name |= {f"{part}.value": moving.value, f"{part}.mean": moving.mean, f"{part}.square": moving.square}
    return by_name


def restored(origin: QuantizedTensor, kept: Mapping[str, Tensor]) -> State:
    """The inverse of `tensors`: the state from its origin and the stored tensors."""

    def moving(part: str) -> Moving | None:
        if f"{part}.value" not in kept:
            return None
        value, mean, square = (kept[f"{part}.{name}"].to(origin.codes.device) for name in ("value", "mean", "square"))
        return Moving(value, mean, square)

    rounding, scales = map(moving, PARTS)
    return State(origin, rounding, scales)


def drawn(step: int, count: int, sequences: int, seed: int) -> list[int]:
    """The indices of the `count` sequences of a step, out of `sequences`.

    No sequence is used again before all others were used; each pass over them has its own random order.
    """
    indices = []
    for position in range(step * count, (step + 1) * count):
        round_, place = divmod(position, sequences)
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed + round_))
        indices.append(int(order[place]))
    return indices


def _slope_of_scales(origin: QuantizedTensor, codes: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂θ at the codes (N, K), from the gradient (N, K) of the weight."""
    if origin.superblocks is None:
        slope = _by_group(_steps(origin, codes).mul_(gradient), origin)
        return slope.mul_(origin.scales.to(torch.float32))
    offsets, groups, S = origin.superblocks.offsets(), origin.column_groups(), origin.superblocks.d.shape[1]
    steps = _steps(origin, codes) if offsets is None else codes.to(torch.float32)
    of_scales = (steps * origin.scales[:, groups]).mul_(gradient)
    of_offsets = [] if offsets is None else [-offsets[:, groups] * gradient]
    return torch.cat([part.reshape(len(part), S, -1).sum(2) for part in (of_scales, *of_offsets)], dim=1)


def _steps(origin: QuantizedTensor, codes: Tensor) -> Tensor:
    """(N, K) float32: the weight in units of its scales."""
    if (table := value_table(origin.scheme)) is not None:
        return table.values(codes)
    return codes.to(torch.float32) - _zeros(origin)


def _places(origin: QuantizedTensor, steps: Tensor) -> Tensor:
    """(N, K) float32: where weights in units of their scales lie among the codes; the inverse of `_steps`."""
    if (table := value_table(origin.scheme)) is not None:
        return table.places(steps)
    return steps + _zeros(origin)


def _zeros(quantized: QuantizedTensor) -> Tensor | int:
    """Zero points per column, (N, K) float32, or the one number that they all are."""
    if quantized.zeros is None:
        return quantized.scheme.middle
    return quantized.zeros.to(torch.float32)[:, quantized.column_groups()]


def _by_group(values: Tensor, origin: QuantizedTensor) -> Tensor:
    """(N, K) -> (N, G), summed over the columns of each group."""
    if origin.group_index is None:
        return values.reshape(*origin.scales.shape, -1).sum(2)
    return torch.zeros_like(origin.scales, dtype=torch.float32).index_add_(1, origin.column_groups(), values)


def _times_by_group(values: Tensor, factors: Tensor, origin: QuantizedTensor) -> Tensor:
    """(N, K) `values` times the factor (N, G) of the group of each column."""
    if origin.group_index is None:
        return (values.reshape(*factors.shape, -1) * factors[..., None]).reshape(values.shape)
    return values * factors[:, origin.column_groups()]


def _stored(scales: Tensor, factor: Tensor) -> Tensor:
    """Scales (N, G) of either sign times `factor`, in the dtype of the file, none smaller than engines accept.

    Scales that were in the range of float16 stay in it, because the same codes may go into a file with that dtype.
    """
    smallest = affine_grid.SMALLEST_SCALE.get(scales.dtype, affine_grid.SMALLEST_SCALE_ELSEWHERE)
    half = affine_grid.SMALLEST_SCALE[torch.float16]
    before = scales.to(torch.float32)
    in_range = before.abs().amin() >= half if scales.numel() else before.new_tensor(False)  # no number is read back
    limit = torch.where(in_range, half, smallest)
    stretched = before * factor
    size = stretched.abs().clamp_(max=torch.finfo(scales.dtype).max).maximum(limit).to(scales.dtype)
    return torch.where(stretched < 0, -size, size)
