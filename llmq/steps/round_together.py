"""Quantize groups of weights with all ranks: the rows of a weight, or the experts of a layer, are divided.

    one group      each rank quantizes some rows of each weight      rows are independent
    several        each rank quantizes some of the groups            groups are independent: experts of one layer

All ranks have the same statistics, and get all results. What is compared per weight, such as the loss on validation
tokens, is added up over the rows of all ranks, so the division changes no choice. A matrix product with fewer rows may
round differently in the last bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.algorithms import Options, Rounding
from llmq.distributed.ranks import ALONE, Ranks, Total
from llmq.methods import Method
from llmq.numerics import float_grid
from llmq.numerics.affine_grid import ScaleDtype
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import stacked
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import StageGain
from llmq.steps.round_group import Rounded, round_group

ROWS = 8  # at least, per rank and weight

Sent = tuple[str, Rounding, tuple[StageGain, ...]]
"""A quantized layer, or some rows of it, as ranks exchange it: its path, its rounding, and what each stage gained."""


@dataclass(frozen=True)
class Group:
    """Weights (N, K) that share an input, their schemes, and the statistics of the input.

    scales      the values that scales are rounded to, if these are not those of the run
    importance  (K,) float32, of the inputs, from an importance matrix; None without one
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, WeightScheme | None]
    stats: InputStats | None
    scales: ScaleDtype | None = None
    importance: Tensor | None = None

    def global_scale(self) -> float | None:
        """The global scale of the weights on an nvfp4 grid, which engines fuse; None if there are none."""
        schemes = self.schemes
        fused = [w for path, w in self.weights.items() if (s := schemes[path]) is not None and s.floats == "nvfp4"]
        return float_grid.global_scale(fused) if fused else None

    def rows_are_divisible(self, ranks: Ranks) -> bool:
        schemes = [scheme for scheme in self.schemes.values() if scheme is not None]
        shortest = min(len(weight) for weight in self.weights.values())
        return shortest >= ROWS * ranks.size and not any(scheme.shares_rows for scheme in schemes)


def round_together(groups: Sequence[Group], method: Method, options: Options, ranks: Ranks) -> list[list[Rounded]]:
    """The quantized weights of each group."""

    def rounded(group: Group, weights: Mapping[str, Tensor], total: Total = ALONE.total) -> list[Rounded]:
        own = replace(
            options, scale_dtype=group.scales or options.scale_dtype, global_scale=group.global_scale(),
            importance=group.importance,
        )  # fmt: skip
        return round_group(weights, group.schemes, group.stats, method, own, total)

    if ranks.size == 1:
        return [rounded(group, group.weights) for group in groups]
    if len(groups) == 1 and groups[0].rows_are_divisible(ranks):
        (group,) = groups
        own_rows = {path: weight[_slice(ranks.part(len(weight)))] for path, weight in group.weights.items()}
        by_rank = ranks.all([_sent(layer) for layer in rounded(group, own_rows, ranks.total)])
        return [[_joined(parts, group) for parts in zip(*by_rank, strict=True)]]
    own = {
        number: [_sent(layer) for layer in rounded(group, group.weights)]
        for number, group in enumerate(groups)
        if number % ranks.size == ranks.rank
    }
    by_number = {number: layers for solved in ranks.all(own) for number, layers in solved.items()}
    return [[_joined([layer], group) for layer in by_number[number]] for number, group in enumerate(groups)]


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _sent(layer: Rounded) -> Sent:
    """All of a layer but its float weight, which every rank has."""
    return layer.path, layer.rounding, layer.gains


def _joined(parts: Sequence[Sent], group: Group) -> Rounded:
    """A layer from its rows, in order."""
    path, rounding, gains = parts[0]
    notes = tuple(dict.fromkeys(note for _, part, _ in parts for note in part.notes))
    quantized = stacked([part.quantized for _, part, _ in parts])
    losses = [part.loss for _, part, _ in parts if part.loss is not None]
    loss = torch.cat(losses) if len(losses) == len(parts) else None
    return Rounded(path, group.weights[path], Rounding(quantized, rounding.damping, notes, loss), gains)
