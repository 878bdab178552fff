"""Grids that are not uniform: the values that codes (quantized values) stand for, where these are not integers."""

import torch
from torch import Tensor

from llmq.numerics.scheme import WeightScheme
from llmq_kernels.value_tables import VALUE_TABLES, ValueTable


def value_table(scheme: WeightScheme) -> ValueTable | None:
    """The table of a grid of small floats, or of IQ4_NL and IQ4_XS; None for codes that stand for themselves."""
    return None if scheme.table is None else VALUE_TABLES[scheme.table]


def encode(weight: Tensor, scales: Tensor, table: ValueTable) -> Tensor:
    """The nearest codes (N, K) uint8 of `weight` (N, K) float32 with these scales (N, G)."""
    groups = weight.unflatten(1, (scales.shape[1], -1))
    return table.nearest(groups / scales.to(torch.float32)[..., None]).flatten(1)
