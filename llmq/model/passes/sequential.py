"""Collect the statistics of each input group, in the order in which the block runs, so that it can be quantized.

The input of o_proj depends on how q, k and v were quantized. So the forward of every batch is suspended before a group.
When the statistics of this group include all batches, the caller quantizes it, and the forwards continue
(`replay.py`). If the outputs of the modules do not fit into memory for all batches, each forward starts again at the
top of the block for every group. That takes about twice the work (2.2 forwards for a Llama block) with the memory of
one batch, and gives the same bits.

The experts of a layer have one stop for each of their two projections; see `statistics.py`.

If a stage compares with the float model, there is a second stream next to the first: the same batches with the hidden
states of the float model, and with the parameters of the block before it was quantized (`Block.originals`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from llmq import memory
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block, Call
from llmq.model.passes.replay import Arrival, Replay, tensors_in
from llmq.model.passes.statistics import Arrived, Stop, Summation, stops_of
from llmq.model.passes.streams import Stream, Streams
from llmq.numerics.input_stats import InputStats

SOLVER_BYTES = 24  # per entry of a Hessian: its sum, the mean, the factor in float64, the factor in float32
GRAM_BYTES = 4  # of these, the sum
CROSS_BYTES = 12  # added by the float stream: a sum, its mean, a product with it
VALIDATION_BYTES = 24  # added by validation statistics: three sums, and the mean of one of them at a time

Quantize = Callable[[Sequence[tuple[InputGroup, InputStats]]], None]


class Sequential:
    """The forwards of all batches through one block; a context that holds the activations that they keep."""

    def __init__(self, block: Block, groups: Sequence[InputGroup], streams: Streams) -> None:
        self._block = block
        self._stops = stops_of(block, groups)
        self._streams = streams
        self._streams_with_weights: list[tuple[Stream, Callable[[], AbstractContextManager[None]]]]
        self._streams_with_weights = [(streams.quantized, nullcontext)]
        if streams.floats is not None:
            self._streams_with_weights.append((streams.floats, block.originals))
        text = streams.text
        fitted = text.fitted_batches if text.validates else None
        self._sums = Summation(
            block,
            fitted=fitted,
            weights=streams.token_weights,
            tokens_per_input=streams.tokens_per_input,
            ranks=streams.ranks,
            unit=text.unit * text.length,
        )
        free = _free_bytes(block, groups, streams)
        self.remembers = bool(streams.ranks.least(_fits(block, self._stops, streams, free)))
        streams.repeated += not self.remembers
        self._at_once = streams.ranks.least(1 + max(0, free) // max(1, _sums_bytes(groups, streams)))
        unquantized = [block.linears[path] for group in groups for path in group.names]
        self._replay = Replay(block, remember=self.remembers, unquantized=unquantized)

    def __enter__(self) -> "Sequential":
        self._replay.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._replay.__exit__(*error)

    def forget(self) -> None:
        """Free the activations that the forwards keep; a forward that goes on starts again at the top of the block."""
        self._replay.forget()

    def run(self, quantize: Quantize) -> None:
        """Call `quantize` for each group with the statistics of its inputs, which have passed the groups before it.

        If there are several ranks, it gets several experts of a layer at once, so that each rank can quantize one.
        """
        for turn in self._statistics():
            quantize(turn)
            self._replay.settle(self._block.linears[path] for group, _ in turn for path in group.names)
            del turn  # before the statistics of the next group are allocated

    def _statistics(self) -> Iterator[list[tuple[InputGroup, InputStats]]]:
        size = self._streams.ranks.size
        for stop in self._stops:
            if stop.experts is not None and self.remembers:
                yield from self._of_remembered_experts(stop)
                continue
            if self._sums.needs_counting(stop):
                self._sums.count(stop, self._arrivals(stop))
            for start in range(0, len(stop.groups), self._at_once):
                groups = stop.groups[start : start + self._at_once]
                pairs = list(zip(groups, self._sums.sums(stop, groups, self._arrivals(stop)), strict=True))
                yield from (pairs[first : first + size] for first in range(0, len(pairs), size))

    def _of_remembered_experts(self, stop: Stop) -> Iterator[list[tuple[InputGroup, InputStats]]]:
        """One pass for all experts of a layer; the statistics of one expert per rank at a time are in memory."""
        arrivals = list(self._arrivals(stop))
        if self._sums.needs_counting(stop):
            self._sums.count(stop, arrivals)
        at_once = min(self._streams.ranks.size, self._at_once)
        for start in range(0, len(stop.groups), at_once):
            groups = stop.groups[start : start + at_once]
            yield list(zip(groups, self._sums.sums(stop, groups, arrivals), strict=True))

    def finish(self, stream: Stream) -> None:
        """Write the outputs of the block to one of the streams; its weights are final now."""
        weights = next(weights for candidate, weights in self._streams_with_weights if candidate is stream)
        if stream.has_outputs or not stream.needs_outputs:
            return
        for number, batch in enumerate(stream.text.batches()):
            with weights():
                stream.write(batch, self._replay.finish((id(stream), number), stream.call(batch)))

    def _arrivals(self, stop: Stop) -> Iterator[Arrived]:
        """The inputs of each batch at a stop, in each stream; None for a batch that does not reach the stop."""
        for number, batch in enumerate(self._streams.text.batches()):
            arrivals: list[Arrival | None] = []
            for stream, weights in self._streams_with_weights:
                with weights():
                    arrivals.append(self._replay.run_to((id(stream), number), stream.call(batch), stop.module))
            yield arrivals, len(batch) * self._streams.text.length


def _sums_bytes(groups: Sequence[InputGroup], streams: Streams) -> int:
    """Bytes of the statistics of one group."""
    widest = max((group.in_features for group in groups), default=0)
    cross = CROSS_BYTES * (streams.floats is not None)
    return (GRAM_BYTES + cross + VALIDATION_BYTES * streams.text.validates) * widest**2


def _free_bytes(block: Block, groups: Sequence[InputGroup], streams: Streams) -> int:
    """Free bytes, in addition to what the block and the solver for its widest weights need."""
    widest = max((group.in_features for group in groups), default=0)
    solver = (SOLVER_BYTES - GRAM_BYTES) * widest**2 + _sums_bytes(groups, streams)
    return (
        streams.memory - solver - (memory.BLOCK_COPIES_TO_QUANTIZE + (streams.floats is not None)) * block.float_bytes
    )


def _fits(block: Block, stops: Sequence[Stop], streams: Streams, free: int) -> bool:
    """Whether the activations that the forwards of all batches keep fit into memory; measured on one sequence."""
    if free <= 0:
        return False
    stream_count = 1 if streams.floats is None else 2
    sample = streams.quantized.sample(streams.text.length)
    return stream_count * streams.text.sequences * kept_bytes(block, stops, sample) <= free


def kept_bytes(block: Block, stops: Sequence[Stop], call: Call) -> int:
    """The most bytes that a forward of `call` keeps while it is suspended at a stop.

    They are measured by running it, because the modules of a block are not known.
    """
    most = 0
    with Replay(block, remember=True) as replay:
        for stop in stops:
            arrival = replay.run_to(0, call, stop.module)
            input_bytes = sum(tensor.nbytes for tensor in tensors_in(arrival)) if stop.experts is not None else 0
            most = max(most, replay.nbytes(0) + input_bytes)
    return most
