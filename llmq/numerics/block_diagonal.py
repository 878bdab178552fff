"""A change of basis for the inputs of a layer: W x = (W A)(A⁻¹ x), where A⁻¹ is folded into the layer that computes x.

A is block-diagonal.  A *basis* is the tensor (K/d, d, d) float32 of its blocks.  With d = 1 these are scales, one per
column; with larger d, neighbouring columns are mixed.
"""

import torch
from torch import Tensor


def scaling(scales: Tensor) -> Tensor:
    """The basis (K, 1, 1) that multiplies each column of a weight by one of the scales (K,)."""
    return scales[:, None, None]


def repeated(matrix: Tensor, features: int) -> Tensor:
    """The basis (features/d, d, d) whose blocks all are `matrix` (d, d)."""
    return matrix.expand(features // len(matrix), -1, -1)


def inverse(basis: Tensor) -> Tensor:
    """A⁻¹ in the dtype of `basis`, computed in float64."""
    return 1 / basis if basis.shape[-1] == 1 else basis.double().inverse().to(basis.dtype)


def columns(weight: Tensor, basis: Tensor) -> Tensor:
    """W A for a weight (N, K) of any float dtype."""
    blocks = basis.to(weight.dtype)
    if basis.shape[-1] == 1:
        return weight * blocks.flatten()
    return torch.einsum("ngd,gde->nge", weight.unflatten(1, basis.shape[:2]), blocks).flatten(1)


def rows(basis: Tensor, weight: Tensor) -> Tensor:
    """A P for a weight or bias (C,) or (C, K) of any float dtype; the basis is (C/d, d, d)."""
    blocks, matrix = basis.to(weight.dtype), weight.reshape(len(weight), -1)
    if basis.shape[-1] == 1:
        return (matrix * blocks.reshape(-1, 1)).reshape(weight.shape)
    return torch.einsum("gde,gek->gdk", blocks, matrix.unflatten(0, basis.shape[:2])).reshape(weight.shape)
