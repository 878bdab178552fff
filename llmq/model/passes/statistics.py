"""Where the forwards of a block stop, and the sums over what its weights are fed there.

A stop is in front of a group of weights that share an input; or, for experts, in front of one projection of all experts
of a layer, because how many tokens each of them sees is only known when all tokens of all batches have been routed.

**Starved experts.**  Below a number of tokens a Hessian says little of an expert's inputs; below its K it is singular,
and an expert that no token reaches has none.  Such an expert gets other tokens of its layer, evenly spaced, as many as
it lacks (`Method.expert_tokens`; why two for each input: eval/LOG.md): they go through it *for statistics only*, and
what the block puts out does not change.  With n_e tokens of
its own and n₀ others

    H_e  =  (n_e H_own + n₀ H_other) / (n_e + n₀)

For the first projection H_other is the layer's input; for the second, what this very expert makes of that.  (What other
experts feed their second projections would not do: channel j of one expert has nothing to do with channel j of
another.)

In the float stream a token may go to other experts.  Of the first projection it is known all the same what the float
model would have fed it; of the second only where the token went to the same expert, and it counts as unmoved elsewhere.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.experts.separate import Routed, SeparateExperts
from llmq.model.passes.replay import Arrival
from llmq.numerics.input_stats import InputStats

Arrived = tuple[Sequence[Arrival | None], int]  # what arrived of a batch in each stream, and how many tokens it has
TokenWeights = Callable[[Sequence[str]], Tensor | None]  # the layers of a group -> (S, T), None where all count alike


@dataclass(frozen=True)
class Stop:
    """In front of `module`, where the inputs of `groups` are known; `numbers` are those of their experts."""

    groups: tuple[InputGroup, ...]
    module: nn.Module
    experts: SeparateExperts | None = None
    numbers: tuple[int, ...] = ()


def stops_of(block: Block, groups: Sequence[InputGroup]) -> list[Stop]:
    """All stops for these groups, in the order in which a forward comes to them."""
    places = {
        f"{path}.{e}.{part}": (experts, side, e)
        for path, experts in block.experts.items()
        for side, parts in enumerate(experts.parts)
        for e in range(experts.expert_count)
        for part in parts
    }
    together: dict[tuple[int, ...], list[InputGroup]] = {}
    for index, group in enumerate(groups):
        place = places.get(group.names[0])
        together.setdefault((index,) if place is None else (-id(place[0]), place[1]), []).append(group)
    stops = []
    for members in together.values():
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
    """How many tokens each expert sees in the batches that are fitted on and in the others; and the layer in all."""

    fitted: list[int]
    judging: list[int]
    layer_fitted: int = 0
    layer_judging: int = 0

    def add(self, routed: Routed, *, fits: bool) -> None:
        """One batch more."""
        seen = self.fitted if fits else self.judging
        for e, rows in enumerate(routed.rows):
            seen[e] += len(rows)
        self.layer_fitted += len(routed.all_rows) * fits
        self.layer_judging += len(routed.all_rows) * (not fits)

    def share(self, e: int, wanted: int, *, judges: bool) -> float:
        """Which part of the layer's tokens expert e is to see beside its own; judges want as much fewer as they are."""
        layer = self.layer_judging if judges else self.layer_fitted
        lacking = wanted * layer / max(1, self.layer_fitted) - (self.judging if judges else self.fitted)[e]
        return max(0.0, lacking / layer) if layer else 0.0


class Summation:
    """Sums over batches, the same for every stop of a block.

    fitted            how many batches statistics are for; those behind them go to `InputStats.held_out`
    weights           how much each token of all batches counts
    tokens_per_input  how many tokens an expert's statistics take for each of its inputs
    """

    def __init__(
        self, block: Block, *, fitted: int | None, weights: TokenWeights | None, tokens_per_input: float
    ) -> None:
        self._block = block
        self._fitted = fitted
        self._weights = weights
        self._tokens_per_input = tokens_per_input
        self._counted: dict[SeparateExperts, Counts] = {}

    def needs_counting(self, stop: Stop) -> bool:
        """Whether `count` has to come before `sums`."""
        return stop.experts is not None and stop.experts not in self._counted

    def count(self, stop: Stop, batches: Iterable[Arrived]) -> None:
        """Count the tokens that each expert sees, and those of the layer."""
        assert stop.experts is not None
        counts = Counts([0] * stop.experts.expert_count, [0] * stop.experts.expert_count)
        for batch, ((arrived, *_), _) in enumerate(batches):
            if isinstance(arrived, Routed):
                counts.add(arrived, fits=self._fits(batch))
        self._counted[stop.experts] = counts

    def sums(self, stop: Stop, groups: Sequence[InputGroup], batches: Iterable[Arrived]) -> list[InputStats]:
        """The statistics of some of a stop's groups, from one pass over the batches."""
        found = [InputStats(g.in_features, self._block.linears[g.names[0]].weight.device) for g in groups]
        judges = found if self._fitted is None else [stats.hold_out() for stats in found]
        weights = [None if self._weights is None else self._weights(group.names) for group in groups]
        end = 0
        for batch, ((arrived, *others), tokens) in enumerate(batches):
            start, end = end, end + tokens
            if arrived is None:
                continue
            original = others[0] if others else None
            for group, own, stats in zip(groups, weights, found if self._fits(batch) else judges, strict=True):
                counts = None if own is None else own.flatten()[start:end]
                if isinstance(arrived, Routed):
                    self._add_routed(stop, group, stats, arrived, original, counts)
                else:
                    _add(stats, arrived, original, counts, tokens)
        return found

    def _fits(self, batch: int) -> bool:
        return self._fitted is None or batch < self._fitted

    def _add_routed(
        self,
        stop: Stop,
        group: InputGroup,
        stats: InputStats,
        routed: Routed,
        other: Arrival | None,
        counts: Tensor | None,
    ) -> None:
        experts, e = stop.experts, stop.numbers[stop.groups.index(group)]
        assert experts is not None
        unrouted = other if isinstance(other, Routed) else None
        inputs, rows = routed.inputs(e), routed.rows[e]
        if len(rows):
            original = None if unrouted is None else _paired(routed, unrouted, e, rows, inputs)
            stats.update(inputs, original, _of_rows(counts, routed, rows))
        wanted = max(1, math.ceil(self._tokens_per_input * group.in_features))
        extra = _spread(routed, e, self._counted[experts].share(e, wanted, judges=stats.judges))
        if len(extra):
            inputs = routed.hidden[extra]
            known = unrouted is not None and routed.inner is None and len(routed.hidden) == routed.tokens
            original = unrouted.hidden[extra] if known and unrouted is not None else None
            if routed.inner is not None:
                with torch.no_grad():
                    inputs = self._block.as_fed(group.names[0], experts.inner(e, inputs))
            if unrouted is not None and original is None:
                original = inputs
            stats.update(inputs, original, _of_rows(counts, routed, extra))
            stats.borrowed += len(extra)


def _add(stats: InputStats, inputs: Tensor, original: Arrival | None, counts: Tensor | None, tokens: int) -> None:
    """What a batch feeds a group of weights, each token in its place; or parts of the tokens, which have no weights."""
    in_place = inputs[..., 0].numel() == tokens
    paired = isinstance(original, Tensor) and inputs.shape == original.shape and in_place
    # Where part of the tokens arrive, they may be others in the float model.
    theirs = original if paired and isinstance(original, Tensor) else None
    stats.update(inputs, theirs, counts.to(inputs.device) if counts is not None and in_place else None)


def _paired(routed: Routed, unrouted: Routed, e: int, rows: Tensor, inputs: Tensor) -> Tensor:
    """What the float stream feeds expert e for the same tokens; its own inputs where that is not known."""
    if routed.inner is None and len(routed.hidden) == routed.tokens:
        return unrouted.hidden[rows]
    theirs = unrouted.inputs(e)
    place = rows.new_full((len(routed.hidden),), -1)
    place[unrouted.rows[e]] = torch.arange(len(theirs), device=rows.device)
    found = place[rows]
    original = inputs.clone()
    original[found >= 0] = theirs[found[found >= 0]]
    return original


def _of_rows(counts: Tensor | None, routed: Routed, rows: Tensor) -> Tensor | None:
    """The weights of tokens, (B·T,), for some rows of `hidden`."""
    return None if counts is None else counts.to(rows.device)[rows % routed.tokens]


def _spread(routed: Routed, e: int, share: float) -> Tensor:
    """Rows of tokens that are not for expert e, evenly spaced: so many as are the `share` of all, if there are."""
    if share == 0:
        return routed.rows[e][:0]
    rows = routed.all_rows
    others = torch.ones(len(routed.hidden), dtype=torch.bool, device=rows.device)
    others[routed.rows[e]] = False
    left = rows[others[rows]]
    wanted = min(len(left), math.ceil(share * len(rows)))
    return left[torch.arange(wanted, device=rows.device) * len(left) // max(1, wanted)]
