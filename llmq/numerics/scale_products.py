"""Scales of groups as numbers of E4M3 times one number per row: kernels for 4 bits with fp8 inputs compute with these.

Such a kernel has one float32 scale per row, and for each group a scale in E4M3.  When a file is loaded, the engine
computes them from the scales s of the groups of a row:

    c = max |s| / 448        v = E4M3(s / c)        v' = E4M3(v / 8), and v' · 8 c takes the place of s

That changes most scales by up to 6 %, after the codes (quantized values) were chosen.  It changes nothing if s = v c
from the start, with c of four binary digits, so that the products fit into bfloat16, v = 448 in one group of each row,
and v ≥ 1/8, so that v / 8 has all digits.  `nearest` searches such scales near given ones.

If the largest scale of a row is below 2⁻⁹, engines use the c of 2⁻⁹, and no v has to be 448.  Such products are
rounded to the dtype of the file, which changes the loaded scales by at most 0.4 % in bfloat16.  An engine that splits
the columns of a weight among GPUs has another c for each part.  Whether a kernel rounds the products of codes and
scales once more is not considered.

Source: github.com/vllm-project/vllm, utils/quant_utils.py, convert_bf16_scales_to_fp8, and input_quant_fp8.py.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST, LOWEST = 448.0, 2.0**-3
SMALLEST_ROW = 1 / (LARGEST * 512)  # c, in engines
DIGITS = 4  # of c
NEAR = (-1, 0, 1, 2)  # c around the largest scale / 448, in units of its last digit
STEPS = (-1, 0, 1)  # of v around s / c, among the numbers of E4M3


def nearest(groups: Tensor, scales: Tensor, costs: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Scales (R, G) float32, products as above, of little error for symmetric codes with `levels` as the largest one.

    groups  (R, G, g) float32, the weights
    scales  (R, G) float32, positive: the scales without the condition
    costs   (G, g) or (R, G, g), the cost of an error in a column
    """
    largest = scales.amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / LARGEST)
    digits = (mantissa * 2**DIGITS).floor()
    best, least = scales, scales.new_full(largest.shape, torch.inf)
    for near in NEAR:
        whole = digits + near
        whole = torch.where(whole > 2**DIGITS, 2**DIGITS + 2, whole)  # the next number of four binary digits
        row = torch.ldexp(whole, exponent - DIGITS).clamp_(min=SMALLEST_ROW)
        tried, errors = _in_row(groups, scales, costs, levels, row, dtype)
        total = errors.sum(1, keepdim=True)
        best, least = torch.where(total < least, tried, best), torch.minimum(total, least)
    return best


def as_loaded(scales: Tensor) -> Tensor:
    """(N, G) float32, the scales that an engine computes with, for those of a file (N, G)."""
    scales = scales.to(torch.float32)
    row = (scales.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST_ROW)
    eighths = ((scales / row).clamp(-LARGEST, LARGEST).to(E4M3).to(torch.float32) / 8).to(E4M3).to(torch.float32)
    return eighths * (row * 8)


def _in_row(
    groups: Tensor, scales: Tensor, costs: Tensor, levels: int, row: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best multiples of `row` (R, 1) for each group, and their errors, (R, G) each."""
    nearest_number = (scales / row).clamp(LOWEST, LARGEST).to(E4M3).view(torch.uint8).to(torch.int16)
    lowest, highest = (int(torch.tensor(limit, dtype=E4M3).view(torch.uint8)) for limit in (LOWEST, LARGEST))
    is_largest = (scales == scales.amax(1, keepdim=True)) & (row > SMALLEST_ROW)  # else c does not depend on it
    best, least = scales, torch.full_like(scales, torch.inf)
    for step in STEPS:
        number = (nearest_number + step).clamp_(lowest, highest).masked_fill_(is_largest, highest)
        tried = (number.to(torch.uint8).view(E4M3).to(torch.float32) * row).to(dtype).to(torch.float32)
        error = _error(groups, tried, costs, levels)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best, least


def _error(groups: Tensor, scales: Tensor, costs: Tensor, levels: int) -> Tensor:
    """(R, G): Σ c (ŵ - w)² with the nearest codes."""
    middle = (levels + 1) // 2
    steps = groups / scales[..., None]
    codes = steps.round().clamp_(-middle, levels - middle)
    return codes.sub_(steps).square_().mul_(costs).sum(-1) * scales.square()
