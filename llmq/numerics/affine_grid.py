"""The affine grid: choose scales and zero points, and quantize weights with them.

    w  ≈  scale * (code - zero),     code in [0, 2**bits - 1]

Codes are the quantized values, unsigned integers; "zero" is the zero point.  The columns of a row are cut into groups,
and each group has its own scale and zero point (Jacob et al. 2018, arXiv:1712.05877, equation 1).  A symmetric grid
fixes the zero point in the middle, so that a min-max scale is max|w| / (levels / 2).

Min-max uses up levels for the rarest weights.  `fit_searched` shrinks (or stretches) the range instead, by the factor
that gives the lowest error  sum_j importance_j * (w_j - ŵ_j)²  of the group: 60 factors, then 16 finer ones around the
best.  An asymmetric grid also tries zero points up to two steps away.  Min-max is the first candidate, so the search is
never worse.  Scales are rounded to the dtype of the file *before* the error is computed, so that the file holds exactly
the scales that were chosen.  A symmetric grid has one code more below zero than above.  Where the largest weight is
positive, the scale is negative, so that this code is used for it ("full range").

Not here: error compensation between columns (algorithms/gptq.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.numerics import float_grid, k_quant_grid, scale_products
from llmq.numerics.quantized_tensor import QuantizedTensor, Superblocks, affine
from llmq.numerics.scheme import WeightScheme
from llmq.numerics.value_table import encode, value_table
from llmq_kernels.grid_search import op as grid_search
from llmq_kernels.grid_search.candidates import Candidates
from llmq_kernels.grid_search.torch_path import stored
from llmq_kernels.value_tables import E4M3

COARSE_STEPS, FINE_STEPS, ZERO_STEPS = 60, 16, 2
LOWEST_FACTOR, HIGHEST_FACTOR = 0.5, 1.08
LOWEST_FACTOR_2_BITS = 0.25  # with four levels the best range is often under half of the largest weight
SMALLEST_SCALE = {torch.float16: 6.2e-5}  # smaller ones are float16 subnormals, which engines flush to zero
SMALLEST_SCALE_ELSEWHERE = 1e-9


@dataclass(frozen=True)
class Bounded:
    """Scales of a dtype, none smaller than `smallest`: they fit in several files with different dtypes of scales."""

    dtype: torch.dtype
    smallest: float


@dataclass(frozen=True)
class Shared:
    """Scales of an nvfp4 grid, which are E4M3 numbers divided by a `global_scale` that fused weights share."""

    global_scale: float


@dataclass(frozen=True)
class Products:
    """Scales of symmetric groups that kernels for fp8 inputs hold exactly (`scale_products.py`), in a `dtype`."""

    dtype: torch.dtype


ScaleDtype = torch.dtype | Bounded | Shared | Products


@dataclass(frozen=True)
class Grid:
    """scales (N, G) in their storage dtype; zeros (N, G) int16, the zero points, or None where symmetric.

    In a two-level grid both are float32 and are computed from `superblocks`.  `global_scale` is that of an nvfp4 grid.
    """

    scheme: WeightScheme
    scales: Tensor
    zeros: Tensor | None
    superblocks: Superblocks | None = None
    global_scale: Tensor | None = None

    def by_column(self, in_features: int) -> tuple[Tensor, Tensor]:
        """float32 scales and zero points of every column, (N, K) each."""
        groups = torch.arange(in_features, device=self.scales.device) // self.scheme.columns_per_group(in_features)
        scales = self.scales.to(torch.float32)[:, groups]
        if self.zeros is None:
            return scales, torch.full((1, 1), float(self.scheme.middle), device=scales.device).expand_as(scales)
        return scales, self.zeros.to(torch.float32)[:, groups]

    def encode(self, weight: Tensor) -> Tensor:
        """The nearest codes, (N, K) uint8, of a float32 weight (N, K)."""
        if (table := value_table(self.scheme)) is not None:
            return encode(weight, self.scales, table)
        scales, zeros = self.by_column(weight.shape[1])
        return (weight / scales).add_(zeros).round_().clamp_(0, self.scheme.levels).to(torch.uint8)

    def quantized(self, codes: Tensor) -> QuantizedTensor:
        return QuantizedTensor(
            codes, self.scales, self.zeros, self.scheme, superblocks=self.superblocks, global_scale=self.global_scale
        )


def fit_minmax(weight: Tensor, scheme: WeightScheme, scale_dtype: ScaleDtype) -> Grid:
    """The grid that covers exactly the range of each group of `weight` (N, K) float32."""
    if scheme.floats is not None:
        return _fit_floats(weight, scheme, scale_dtype, searched=False)
    if scheme.two_level:  # scales depend on each other, so there is no min-max grid
        return fit_searched(weight, scheme, scale_dtype)
    groups = _grouped(weight, scheme)
    scales, zeros = _minmax(groups, scheme, scale_dtype)
    if _are_products(scheme, scale_dtype):
        scales = scale_products.nearest(groups, scales, groups.new_ones(()), scheme.levels, dtype_of(scale_dtype))
    return _assemble(weight.shape[0], scheme, scale_dtype, scales, zeros)


def fit_searched(
    weight: Tensor, scheme: WeightScheme, scale_dtype: ScaleDtype, importance: Tensor | None = None
) -> Grid:
    """The grid of least error for each group of `weight` (N, K) float32; `importance` (K,) weighs the columns."""
    if scheme.floats is not None:
        return _fit_floats(weight, scheme, scale_dtype, importance)
    if scheme.two_level:
        superblocks = k_quant_grid.fit(weight, scheme, importance)
        return Grid(scheme, *affine(superblocks), superblocks)
    groups = _grouped(weight, scheme)  # (R, G, g)
    signs = _signs(groups) if scheme.symmetric else None
    groups = groups if signs is None else groups * signs[..., None]
    costs = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(torch.float32)
    costs = (
        costs.expand(weight.shape).reshape(groups.shape)
        if scheme.group_size == "tensor"
        else costs.reshape(groups.shape[1:])
    )
    widest, zeros = _minmax(groups, scheme, torch.float32)
    first = _minmax(groups, scheme, scale_dtype)
    scales, zeros = grid_search.search(groups, costs, first, widest, zeros, _candidates(scheme, scale_dtype))
    if _are_products(scheme, scale_dtype):
        scales = scale_products.nearest(groups, scales, costs, scheme.levels, dtype_of(scale_dtype))
    scales = scales if signs is None else scales * signs
    return _assemble(weight.shape[0], scheme, scale_dtype, scales, zeros)


def _fit_floats(
    weight: Tensor,
    scheme: WeightScheme,
    scale_dtype: ScaleDtype,
    importance: Tensor | None = None,
    *,
    searched: bool = True,
) -> Grid:
    if not scheme.few_scales:
        largest = _grouped(weight, scheme).abs().amax(-1)  # (N, G)
        parts = largest.split(scheme.rows_per_scale)  # rows that share their scales
        largest = torch.cat([rows.amax(0, keepdim=True).expand_as(rows) for rows in parts])
        return Grid(scheme, _stored(largest / E4M3.top, scale_dtype).to(dtype_of(scale_dtype)), None)
    if scheme.floats == "mxfp4":
        return Grid(scheme, float_grid.fit(weight, scheme, 1.0, importance, searched=searched), None)
    shared = scale_dtype.global_scale if isinstance(scale_dtype, Shared) else float_grid.global_scale([weight])
    scales = float_grid.fit(weight, scheme, shared, importance, searched=searched)
    return Grid(scheme, scales, None, global_scale=torch.full_like(scales[:, :1], shared))


def storable(scales: Tensor, scale_dtype: ScaleDtype) -> Tensor:
    """`scales` (N, G) float32 in the dtype of the file, raised to the smallest allowed scale; signs are kept."""
    return _stored(scales.abs(), scale_dtype).copysign(scales).to(dtype_of(scale_dtype))


def dtype_of(scale_dtype: ScaleDtype) -> torch.dtype:
    if isinstance(scale_dtype, Shared):
        return torch.float32
    return scale_dtype.dtype if isinstance(scale_dtype, Bounded | Products) else scale_dtype


def _are_products(scheme: WeightScheme, scale_dtype: ScaleDtype) -> bool:
    return isinstance(scale_dtype, Products) and scheme.symmetric and isinstance(scheme.group_size, int)


def _candidates(scheme: WeightScheme, scale_dtype: ScaleDtype) -> Candidates:
    lowest = LOWEST_FACTOR_2_BITS if scheme.bits == 2 else LOWEST_FACTOR
    factors = torch.linspace(lowest, HIGHEST_FACTOR, COARSE_STEPS).tolist()
    step = factors[1] - factors[0]
    offsets = torch.linspace(-step, step, FINE_STEPS).tolist()
    shifts = (0,) if scheme.symmetric else tuple(range(-ZERO_STEPS, ZERO_STEPS + 1))
    return Candidates(
        scheme.levels,
        scheme.symmetric,
        tuple(factors),
        tuple(offsets),
        shifts,
        smallest(scale_dtype),
        dtype_of(scale_dtype),
    )


def _grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """(N, K) -> (N, G, g); for a per-tensor grid one group (1, 1, N * K)."""
    if scheme.group_size == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], -1, scheme.columns_per_group(weight.shape[1]))


def _signs(groups: Tensor) -> Tensor:
    """(R, G) float32: -1 where the largest weight of a group of (R, G, g) is positive, and 1 elsewhere."""
    return torch.where(groups.amax(-1) > -groups.amin(-1), -1.0, 1.0)


def _minmax(groups: Tensor, scheme: WeightScheme, scale_dtype: ScaleDtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points (R, G) float32 from the range of each group of (R, G, g), extended to include zero."""
    if scheme.symmetric:
        scales = groups.abs().amax(-1) * (2 / scheme.levels)
        return _stored(scales, scale_dtype), torch.full_like(scales, scheme.middle)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scales = _stored((high - low) / scheme.levels, scale_dtype)
    return scales, (-low / scales).round_().clamp_(0, scheme.levels)


def smallest(scale_dtype: ScaleDtype) -> float:
    """The smallest scale that is stored."""
    if isinstance(scale_dtype, Bounded):
        return scale_dtype.smallest
    return SMALLEST_SCALE.get(dtype_of(scale_dtype), SMALLEST_SCALE_ELSEWHERE)


def _stored(scales: Tensor, scale_dtype: ScaleDtype) -> Tensor:
    return stored(scales, dtype_of(scale_dtype), smallest(scale_dtype))


def _assemble(rows: int, scheme: WeightScheme, scale_dtype: ScaleDtype, scales: Tensor, zeros: Tensor) -> Grid:
    """(R, G) float32 scales and zero points -> a `Grid`; a per-tensor scale is repeated for every row."""
    scales, zeros = (part.expand(rows, -1).contiguous() for part in (scales, zeros))
    return Grid(scheme, scales.to(dtype_of(scale_dtype)), None if scheme.symmetric else zeros.to(torch.int16))
