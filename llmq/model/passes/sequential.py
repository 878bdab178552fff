"""Give each group of weights the statistics of its inputs, in the order in which the block runs.

What o_proj is fed depends on how q, k and v were quantized.  So the forward of every batch ends in front of a group;
when the group has seen its input of every batch, the caller quantizes it, and then the forwards go on (`replay.py`).
Where the outputs of all batches' modules do not fit into memory, each forward starts again at the top of the block for
every group: about twice the work (for a Llama block 2.2 forwards), in the memory of one batch, to the same bits.

The experts of a layer have one stop for each of their two projections; see `statistics.py`.

Where a stage compares with the float model, a second stream runs next to the first: the same batches on the float
model's hidden states, with the parameters that the block had before any was quantized (`Block.originals`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from llmq import memory
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block, Call
from llmq.model.passes.replay import Arrival, Replay, tensors_in
from llmq.model.passes.statistics import Arrived, Stop, Summation, TokenWeights, stops_of
from llmq.model.passes.streams import Stream, Text
from llmq.numerics.input_stats import InputStats

SOLVER_BYTES = 24  # for each entry of a Hessian: its sum, the mean, the factor in float64, the factor in float32
GRAM_BYTES = 4  # of these, the sum
CROSS_BYTES = 12  # of what the float stream adds: a sum, its mean, a product with it
VALIDATION_BYTES = 24  # of validation statistics: three sums, of which one is looked at at a time, with its mean
REPEATED = (
    "{blocks} blocks took about twice the time, computing the same numbers again: the activations of all the text did "
    "not fit into memory at once"
)

Quantize = Callable[[InputGroup, InputStats], None]


@dataclass
class Streams:
    """The calibration text on its way through the blocks.

    quantized  as the quantized blocks leave it
    floats     as the float model does; None where no stage compares the two
    weights    how much each token counts in the statistics of a group
    tokens_per_input  how many tokens an expert's statistics take for each of its inputs
    memory     bytes that are free.  Of what the blocks and the solver leave of them, activations may take as much as
               they need to spare repeated work
    repeated   blocks whose activations did not fit
    """

    quantized: Stream
    floats: Stream | None = None
    weights: TokenWeights | None = None
    tokens_per_input: float = 0.0
    memory: int = 0
    repeated: int = 0

    @property
    def text(self) -> Text:
        return self.quantized.text

    @property
    def notes(self) -> list[str]:
        """What a user should know of the way that was taken."""
        return [REPEATED.format(blocks=self.repeated)] if self.repeated else []

    def enter(self, block: Block) -> None:
        """`block` was loaded and is about to be changed; to be called before that."""
        if self.floats is not None:
            block.keep_originals()

    def transformed(self, block: Block) -> None:
        """`block` was rewritten into an equal one, whose weights are the originals from now on.

        Equal but for rounding, so what the float stream goes on with comes from the block as it was: a run that is
        continued later can read that one only, and has to end in the same bytes.
        """
        if self.floats is not None:
            self.floats.keep_inputs()
            with block.originals():
                self.floats.run(block)
            block.keep_originals()

    def run_floats(self, block: Block) -> None:
        """See to it that the float stream knows what `block`, as it was, puts out."""
        if self.floats is not None and not self.floats.has_outputs:
            with block.originals():
                self.floats.run(block)

    def advance(self) -> None:
        """Stand in front of the next block, with what this one put out."""
        self.quantized.advance()
        if self.floats is not None:
            self.floats.advance()

    def past(self, block: Block) -> None:
        """Run a block whose weights are settled, and stand in front of the next one."""
        self.run_floats(block)
        self.quantized.run(block)
        self.advance()


class Sequential:
    """The forwards of all batches through one block; a context that holds what they keep."""

    def __init__(self, block: Block, groups: Sequence[InputGroup], streams: Streams) -> None:
        self._block = block
        self._stops = stops_of(block, groups)
        self._streams = streams
        self._ways: list[tuple[Stream, Callable[[], AbstractContextManager[None]]]] = [(streams.quantized, nullcontext)]
        if streams.floats is not None:
            self._ways.append((streams.floats, block.originals))
        text = streams.text
        fitted = text.fitted_batches if text.validation else None
        self._sums = Summation(block, fitted=fitted, weights=streams.weights, tokens_per_input=streams.tokens_per_input)
        free = _free_bytes(block, groups, streams)
        self.remembers = _fits(block, self._stops, streams, free)
        streams.repeated += not self.remembers
        self._at_once = 1 + max(0, free) // max(1, _sums_bytes(groups, streams))
        self._replay = Replay(block, remember=self.remembers)

    def __enter__(self) -> "Sequential":
        self._replay.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._replay.__exit__(*error)

    def run(self, quantize: Quantize) -> None:
        """Call `quantize` for each group with the statistics of its inputs, which come through the groups before it."""
        for group, stats in self._statistics():
            quantize(group, stats)
            del stats  # before those of the next group are made

    def _statistics(self) -> Iterator[tuple[InputGroup, InputStats]]:
        for stop in self._stops:
            if stop.experts is not None and self.remembers:
                yield from self._of_remembered_experts(stop)
                continue
            if self._sums.needs_counting(stop):
                self._sums.count(stop, self._arrivals(stop))
            for start in range(0, len(stop.groups), self._at_once):
                groups = stop.groups[start : start + self._at_once]
                yield from zip(groups, self._sums.sums(stop, groups, self._arrivals(stop)), strict=True)

    def _of_remembered_experts(self, stop: Stop) -> Iterator[tuple[InputGroup, InputStats]]:
        """One pass for all experts of a layer; of their statistics, one at a time is in memory."""
        arrivals = list(self._arrivals(stop))
        if self._sums.needs_counting(stop):
            self._sums.count(stop, arrivals)
        for group in stop.groups:
            [stats] = self._sums.sums(stop, [group], arrivals)
            yield group, stats
            del stats

    def finish(self, stream: Stream) -> None:
        """Note what the block puts out in one of the streams, its weights being settled by now."""
        weights = next(weights for way, weights in self._ways if way is stream)
        if stream.has_outputs or not stream.needs_outputs:
            return
        for number, batch in enumerate(stream.text.batches()):
            with weights():
                stream.write(batch, self._replay.finish((id(stream), number), stream.call(batch)))

    def _arrivals(self, stop: Stop) -> Iterator[Arrived]:
        """What arrives of each batch at a stop, in each stream; None for a batch that does not come there."""
        for number, batch in enumerate(self._streams.text.batches()):
            arrived: list[Arrival | None] = []
            for stream, weights in self._ways:
                with weights():
                    arrived.append(self._replay.run_to((id(stream), number), stream.call(batch), stop.module))
            yield arrived, len(batch) * self._streams.text.length


def _sums_bytes(groups: Sequence[InputGroup], streams: Streams) -> int:
    """What the statistics of one group take."""
    widest = max((group.in_features for group in groups), default=0)
    cross = CROSS_BYTES * (streams.floats is not None)
    return (GRAM_BYTES + cross + VALIDATION_BYTES * (streams.text.validation > 0)) * widest**2


def _free_bytes(block: Block, groups: Sequence[InputGroup], streams: Streams) -> int:
    """What the block and the solver of its widest weights leave of the memory."""
    widest = max((group.in_features for group in groups), default=0)
    solver = (SOLVER_BYTES - GRAM_BYTES) * widest**2 + _sums_bytes(groups, streams)
    return (
        streams.memory - solver - (memory.BLOCK_COPIES_TO_QUANTIZE + (streams.floats is not None)) * block.float_bytes
    )


def _fits(block: Block, stops: Sequence[Stop], streams: Streams, free: int) -> bool:
    """Whether what the forwards of all batches keep fits into what is free; found on one sequence, as long as all
    are.
    """
    if free <= 0:
        return False
    ways = 1 if streams.floats is None else 2
    sample = streams.quantized.sample(streams.text.length)
    return ways * streams.text.sequences * kept_bytes(block, stops, sample) <= free


def kept_bytes(block: Block, stops: Sequence[Stop], call: Call) -> int:
    """What a forward of `call` keeps while it waits in front of a stop, at the one where that is most.

    Found by running it: which modules a block has is its own choice.
    """
    most = 0
    with Replay(block, remember=True) as replay:
        for stop in stops:
            arrival = replay.run_to(0, call, stop.module)
            held = sum(tensor.nbytes for tensor in tensors_in(arrival)) if stop.experts is not None else 0
            most = max(most, replay.nbytes(0) + held)
    return most
