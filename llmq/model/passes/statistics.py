"""Where the forwards of a block are suspended, and the statistics of the inputs there.

A stop is before a group of weights that share an input. For experts it is before one projection of all experts of a
layer, because the number of tokens of each expert is only known when all tokens of all batches have been routed.

**Under-sampled experts.** With few tokens a Hessian describes an expert's inputs badly; with fewer than K it is
singular, and an expert that no token reaches has none. Such an expert is padded with other tokens of its layer, evenly
spaced, up to a minimum (`Method.expert_tokens`; eval/LOG.md shows why two per input). They are run through the expert
*for statistics only*; the output of the block does not change. With n_e routed tokens and n₀ others

    H_e  =  (n_e H_own + n₀ H_other) / (n_e + n₀)

For the first projection, H_other is that of the layer's input; for the second, that of the inner activations of the
same expert. (The inner activations of other experts would be useless: channel j of one expert is unrelated to channel j
of another.)

In the float stream a token may go to other experts. The float input of the first projection is known anyway. The float
input of the second is known only if the token went to the same expert; otherwise it is assumed to be equal.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.distributed.ranks import ALONE, Ranks
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.experts.separate import Routed, SeparateExperts
from llmq.model.passes.replay import Arrival
from llmq.numerics.input_histogram import InputHistogram
from llmq.numerics.input_stats import InputStats

Arrived = tuple[Sequence[Arrival | None], int]  # the inputs of a batch in each stream, and its number of tokens
TokenWeights = Callable[[Sequence[str]], Tensor | None]  # the layers of a group -> (S, T), or None for equal weights


@dataclass(frozen=True)
class Stop:
    """A place before `module`, where the inputs of `groups` are known; `numbers` are the numbers of their experts."""

    groups: tuple[InputGroup, ...]
    module: nn.Module
    experts: SeparateExperts | None = None
    numbers: tuple[int, ...] = ()


def stops_of(block: Block, groups: Sequence[InputGroup]) -> list[Stop]:
    """All stops for these groups, in the order in which a forward reaches them."""
    places = {
        f"{path}.{e}.{part}": (experts, side, e)
        for path, experts in block.experts.items()
        for side, parts in enumerate(experts.parts)
        for e in range(experts.expert_count)
        for part in parts
    }
    by_stop: dict[tuple[int, ...], list[InputGroup]] = {}
    for index, group in enumerate(groups):
        place = places.get(group.names[0])
        by_stop.setdefault((index,) if place is None else (-id(place[0]), place[1]), []).append(group)
    stops = []
    for members in by_stop.values():
        place = places.get(members[0].names[0])
        if place is None:
            stops.append(Stop(tuple(members), block.linears[members[0].names[0]]))
            continue
        experts, side, _ = place
        station = experts.before_down if side else experts.before_up
        numbers = tuple(places[group.names[0]][2] for group in members)
        stops.append(Stop(tuple(members), station, experts, numbers))
    return stops


@dataclass
class Counts:
    """Number of tokens of each expert, and of the whole layer, in fitted batches and in validation batches."""

    fitted: list[int]
    validation: list[int]
    layer_fitted: int = 0
    layer_validation: int = 0

    def add(self, routed: Routed, *, fits: bool) -> None:
        """Count one batch."""
        counts = self.fitted if fits else self.validation
        for e, rows in enumerate(routed.rows):
            counts[e] += len(rows)
        self.layer_fitted += len(routed.all_rows) * fits
        self.layer_validation += len(routed.all_rows) * (not fits)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the counts of all ranks."""
        E = len(self.fitted)
        totals = ranks.total(*self.fitted, *self.validation, self.layer_fitted, self.layer_validation)
        *experts, self.layer_fitted, self.layer_validation = map(int, totals)
        self.fitted, self.validation = experts[:E], experts[E:]

    def share(self, e: int, wanted: int, *, validates: bool) -> float:
        """The fraction of the layer's tokens with which expert e is padded, to have `wanted` tokens in fitted batches.

        In validation batches the wanted number is lower, in proportion to the tokens of the layer.
        """
        layer = self.layer_validation if validates else self.layer_fitted
        lacking = wanted * layer / max(1, self.layer_fitted) - (self.validation if validates else self.fitted)[e]
        return max(0.0, lacking / layer) if layer else 0.0


class Summation:
    """Sums statistics over batches, for all stops of a block.

    fitted            number of fitted batches; the batches after them go to `InputStats.validation`. None: all are
                      fitted
    weights           the weight of each token
    tokens_per_input  minimum number of tokens in the statistics of an expert, per input of its layers
    ranks             the processes whose sums are added; each has a part of the batches
    unit              number of tokens that are summed at once, see `InputStats`
    """

    def __init__(
        self,
        block: Block,
        *,
        fitted: int | None,
        weights: TokenWeights | None,
        tokens_per_input: float,
        ranks: Ranks = ALONE,
        unit: int = 0,
    ) -> None:
        self._block = block
        self._ranks = ranks
        self._unit = unit
        self._fitted = fitted
        self._weights = weights
        self._tokens_per_input = tokens_per_input
        self._counted: dict[SeparateExperts, Counts] = {}
        self._largest: dict[nn.Module, float] = {}  # input of all experts, by the module of the stop

    def needs_counting(self, stop: Stop) -> bool:
        """Whether `count` has to be called before `sums`."""
        if stop.experts is None:
            return False
        return stop.experts not in self._counted or (self._awaits(stop) and stop.module not in self._largest)

    def _awaits(self, stop: Stop) -> bool:
        """Whether the inputs at a stop will get a scale that is measured."""
        return any(self._block.inputs.awaits(name) for group in stop.groups for name in group.names)

    def count(self, stop: Stop, batches: Iterable[Arrived]) -> None:
        """Count the tokens of each expert and of the layer, and find the largest input if a scale is measured on it."""
        assert stop.experts is not None
        measures, largest = self._awaits(stop), 0.0
        counts = Counts([0] * stop.experts.expert_count, [0] * stop.experts.expert_count)
        for batch, ((arrived, *_), _) in enumerate(batches):
            if isinstance(arrived, Routed):
                counts.add(arrived, fits=self._fits(batch))
                largest = max(largest, arrived.largest()) if measures else largest
        counts.sum_over(self._ranks)
        if measures:
            self._largest[stop.module] = max(self._ranks.all(largest))
        self._counted[stop.experts] = counts

    def sums(self, stop: Stop, groups: Sequence[InputGroup], batches: Iterable[Arrived]) -> list[InputStats]:
        """The statistics of some of a stop's groups, from one pass over the batches."""
        places = [self._block.linears[group.names[0]].weight.device for group in groups]
        fitted = [InputStats(g.in_features, place, unit=self._unit) for g, place in zip(groups, places, strict=True)]
        validation = fitted if self._fitted is None else [stats.begin_validation() for stats in fitted]
        for group, stats in zip(groups, fitted, strict=True):
            waiting = [self._block.weight(name) for name in group.names if self._block.inputs.awaits(name)]
            if waiting and stop.experts is not None:
                stats.largest_of_experts = self._largest[stop.module]
            elif waiting:
                stats.histogram = InputHistogram(torch.cat(waiting).square().sum(0))
        weights = [None if self._weights is None else self._weights(group.names) for group in groups]
        end = 0
        for batch, ((arrived, *others), tokens) in enumerate(batches):
            start, end = end, end + tokens
            if arrived is None:
                continue
            original = others[0] if others else None
            batch_stats = fitted if self._fits(batch) else validation
            for group, group_weights, stats in zip(groups, weights, batch_stats, strict=True):
                token_weights = None if group_weights is None else self._in_order(group_weights, start, end)
                if isinstance(arrived, Routed):
                    self._add_routed(stop, group, stats, arrived, original, token_weights)
                else:
                    _add(stats, arrived, original, token_weights, tokens)
        for stats in fitted:
            stats.sum_over(self._ranks)
        return fitted

    def _in_order(self, weights: Tensor, start: int, end: int) -> Tensor:
        """The weights (S, T) of the tokens from `start` to `end`, (B·T,) in the order in which layers get them."""
        T = weights.shape[1]
        rows = weights[start // T : end // T]
        return (rows.T if self._block.layout.tokens_first else rows).flatten()

    def _fits(self, batch: int) -> bool:
        return self._fitted is None or batch < self._fitted

    def _add_routed(
        self,
        stop: Stop,
        group: InputGroup,
        stats: InputStats,
        routed: Routed,
        float_arrival: Arrival | None,
        token_weights: Tensor | None,
    ) -> None:
        experts, e = stop.experts, stop.numbers[stop.groups.index(group)]
        assert experts is not None
        float_routed = float_arrival if isinstance(float_arrival, Routed) else None
        inputs, rows = routed.inputs(e), routed.rows[e]
        if len(rows):
            original = None if float_routed is None else _float_inputs(routed, float_routed, e, rows, inputs)
            stats.update(inputs, original, _of_rows(token_weights, routed, rows))
        wanted = max(1, math.ceil(self._tokens_per_input * group.in_features))
        padding = _padding_rows(routed, e, self._counted[experts].share(e, wanted, validates=stats.judges))
        if len(padding):
            inputs = routed.hidden[padding]
            known = float_routed is not None and routed.inner is None and len(routed.hidden) == routed.tokens
            original = float_routed.hidden[padding] if known and float_routed is not None else None
            if routed.inner is not None:
                with torch.no_grad():
                    inputs = self._block.as_fed(group.names[0], experts.inner(e, inputs))
            if float_routed is not None and original is None:
                original = inputs
            stats.update(inputs, original, _of_rows(token_weights, routed, padding))
            stats.borrowed += len(padding)


def _add(stats: InputStats, inputs: Tensor, original: Arrival | None, weights: Tensor | None, tokens: int) -> None:
    """Add the input of a group of weights, with all tokens of a batch in their places.

    If only part of the tokens arrive, their places are unknown, so they get no weights and no float inputs: the float
    model may have sent other tokens.
    """
    in_place = inputs[..., 0].numel() == tokens
    paired = isinstance(original, Tensor) and inputs.shape == original.shape and in_place
    float_inputs = original if paired and isinstance(original, Tensor) else None
    stats.update(inputs, float_inputs, weights.to(inputs.device) if weights is not None and in_place else None)


def _float_inputs(routed: Routed, float_routed: Routed, e: int, rows: Tensor, inputs: Tensor) -> Tensor:
    """The inputs of expert e in the float stream for the same tokens; where they are not known, `inputs`."""
    if routed.inner is None and len(routed.hidden) == routed.tokens:
        return float_routed.hidden[rows]
    known_inputs = float_routed.inputs(e)
    position = rows.new_full((len(routed.hidden),), -1)
    position[float_routed.rows[e]] = torch.arange(len(known_inputs), device=rows.device)
    position_of_row = position[rows]
    original = inputs.clone()
    original[position_of_row >= 0] = known_inputs[position_of_row[position_of_row >= 0]]
    return original


def _of_rows(weights: Tensor | None, routed: Routed, rows: Tensor) -> Tensor | None:
    """The weights of the tokens, (B·T,), for some rows of `hidden`."""
    return None if weights is None else weights.to(rows.device)[rows % routed.tokens]


def _padding_rows(routed: Routed, e: int, share: float) -> Tensor:
    """Rows of tokens that do not go to expert e, evenly spaced: the fraction `share` of all rows, or all there are."""
    if share == 0:
        return routed.rows[e][:0]
    rows = routed.all_rows
    is_other = torch.ones(len(routed.hidden), dtype=torch.bool, device=rows.device)
    is_other[routed.rows[e]] = False
    others = rows[is_other[rows]]
    count = min(len(others), math.ceil(share * len(rows)))
    return others[torch.arange(count, device=rows.device) * len(others) // max(1, count)]
