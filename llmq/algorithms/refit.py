"""Refit the scales: with the codes fixed, a row is linear in its scales, so least squares has a closed form.

Codes q are the quantized values, z the zero points.  Let B (G, K) hold q - z of a row: the columns of group g in row g,
zero elsewhere.  So ŵ = s B.  From the old scales s⁰, with d = s - s⁰ and δ = w* - s⁰ B,

    argmin_d  (δ - d B) H (δ - d B)ᵀ + μ Σ_g D_g d_g²        D = diag(B H Bᵀ)

    d = r (A + μ diag D)⁻¹        A = B H Bᵀ (G, G),  r = δ H Bᵀ

The ridge μ (`ridge.py`) keeps scales near the old scales where the codes hardly determine them.  All groups of a row
are solved together, so that one group can compensate for the error of another.  Scales are rounded to the dtype of the
file, and a row is accepted only where its loss falls; the change of the loss is  d A dᵀ - 2 r dᵀ.  A scale that rows
share is not refitted.

Two-level grids are refitted in `algorithms/refit_k_quants.py`, nvfp4 and mxfp4 in `algorithms/refit_floats.py`.
"""

import dataclasses

import torch
from torch import Tensor

from llmq.algorithms import Options, refit_floats, refit_k_quants, ridge
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor

ELEMENTS_AT_ONCE = 1 << 24  # of the systems (G, G) and of the products (K,) of the rows that are solved together


def refine(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
    """See `RefinementStage`."""
    if quantized.scheme.shares_rows:
        return quantized
    if quantized.scheme.few_scales:
        return refit_floats.refine(target, quantized, hessian)
    if quantized.superblocks is not None:
        return refit_k_quants.refine(target, quantized, hessian, options)
    K, G = quantized.shape[1], quantized.scales.shape[1]
    rows = max(1, ELEMENTS_AT_ONCE // max(G * G, K))
    pieces = [(start, start + rows) for start in range(0, len(target), rows)]
    scales = torch.cat([_refit(target[a:b], quantized.rows(a, b), hessian, options.scale_dtype) for a, b in pieces])
    return dataclasses.replace(quantized, scales=scales)


def _refit(target: Tensor, quantized: QuantizedTensor, hessian: Tensor, scale_dtype: affine_grid.ScaleDtype) -> Tensor:
    """Scales (N, G) in their storage dtype: refitted in the rows that this improves."""
    steps = _steps(quantized)  # (N, K), q - z
    old = quantized.scales.to(torch.float32)
    A, r = _normal_equations(steps, target - quantized.dequantize(), hessian, quantized.scales.shape[1])
    fitted = old + ridge.solve(A, r)
    usable = torch.isfinite(fitted) & (fitted * old > 0)
    fitted = affine_grid.storable(torch.where(usable, fitted, old), scale_dtype)
    lower = ridge.change(A, r, fitted.to(torch.float32) - old) < 0
    return torch.where(lower[:, None], fitted, quantized.scales)


def _steps(quantized: QuantizedTensor) -> Tensor:
    """(N, K) float32, q - z: the weight in units of its scales."""
    return dataclasses.replace(quantized, scales=torch.ones_like(quantized.scales)).dequantize()


def _normal_equations(steps: Tensor, difference: Tensor, hessian: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """A = B H Bᵀ (N, G, G) and r = δ H Bᵀ (N, G), of the `difference` δ (N, K)."""
    N, K = steps.shape
    width = K // G
    A = torch.empty(N, G, G, device=steps.device)
    for group in range(G):
        inside = slice(group * width, (group + 1) * width)
        product = steps[:, inside] @ hessian[inside]  # (N, K): row g of B, times H
        A[:, group] = product.mul_(steps).reshape(N, G, width).sum(2)
    r = (difference @ hessian).mul_(steps).reshape(N, G, width).sum(2)
    return A, r
