"""The calibration text on its way through the blocks: the only thing that lives across them.

After block i was quantized and run, the stream holds the hidden states that the quantized prefix makes, one tensor
(…, B, T, D) a batch; and, where a stage compares the two, those of the float model beside them.  What else block i + 1
is called with is recorded when it is needed and not kept, so memory does not grow with the number of blocks, whatever
masks or per-layer inputs a model has.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from llmq.memory import BLOCK_COPIES_TO_QUANTIZE
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Call, Skeleton
from llmq.model.passes.sequential import Flow, held_bytes, why_not_held
from llmq.model.passes.statistics import TokenWeights
from llmq.numerics.input_stats import InputStats

SOLVER_BYTES = 24  # for each entry of a Hessian: its sum, the mean, the factor in float64, the factor in float32
GRAM_BYTES = 4  # of these, the sum
CROSS_BYTES = 12  # of what the float stream adds: a sum, its mean, a product with it
HELD_OUT_BYTES = 24  # of held-out statistics: three sums, of which one is looked at at a time, with its mean


class Stream:
    """The windows (S, T) int64 in batches, and where they are: in front of block `position`.

    memory     how many bytes are free.  Of what the blocks and the solver leave of it, activations may take as much as
               they need to spare repeated work (see `model/passes/sequential.py`)
    originals  whether the float model's hidden states are carried along
    held_out   how many of the last windows nothing is fitted on
    weights    how much each token counts in the statistics of a group
    tokens_per_input  how many tokens an expert's statistics take for each of its inputs
    to_the_head       whether the text is to go through the last block, too
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Tensor,
        batch: int,
        memory: int = 0,
        *,
        originals: bool = False,
        held_out: int = 0,
        weights: TokenWeights | None = None,
        tokens_per_input: float = 0.0,
        to_the_head: bool = False,
    ) -> None:
        self._skeleton = skeleton
        fitted, judging = windows[: len(windows) - held_out], windows[len(windows) - held_out :]
        self._batches = [*fitted.split(batch), *(judging.split(batch) if held_out else ())]
        self._fitted = -(-len(fitted) // batch) if held_out else None  # batches in front of the held-out ones
        self._token_weights = weights
        self._tokens_per_input = tokens_per_input
        self._to_the_head = to_the_head
        self._never_held = why_not_held()
        self._memory = memory
        self._repeated = 0  # blocks whose activations did not fit
        self._hidden: list[Tensor] = []  # empty in front of the first block, whose hidden state is recorded
        self._originals: list[Tensor] | None = [] if originals else None
        self._next_originals: list[Tensor] | None = None  # where they were needed before the block was done
        self.position = 0

    @property
    def notes(self) -> list[str]:
        """What a user should know of the way that was taken."""
        if not self._repeated:
            return []
        reason = self._never_held or "the activations of all the text did not fit into memory at once"
        return [f"{self._repeated} blocks took about twice the time, computing the same numbers again: {reason}"]

    def enter(self, block: Block) -> None:
        """`block` was loaded and is about to be changed; to be called before that."""
        if self._originals is not None:
            block.keep_originals()

    def transformed(self, block: Block) -> None:
        """`block` was rewritten into an equal one, whose weights are the originals from now on.

        Equal but for rounding, so what the float stream goes on with comes from the block as it was: a run that is
        continued later can read that one only, and is to end in the same bytes.
        """
        if self._originals is not None:
            with block.originals():
                self._next_originals = self._run(block, self._originals, keep=True)
            block.keep_originals()

    def calls(self) -> Iterator[Call]:
        """For each batch, what the block at `position` is called with."""
        return self._calls(self._hidden)

    def fitted_calls(self) -> Iterator[Call]:
        """The same without the batches that are held out."""
        return islice(self.calls(), self._fitted)

    def _calls(self, hidden: list[Tensor]) -> Iterator[Call]:
        for index, tokens in enumerate(self._batches):
            call = self._skeleton.record(self.position, tokens)
            yield call.with_hidden(hidden[index]) if hidden else call

    def sample(self, tokens: int) -> Call:
        """A call on about so many tokens, for probing: the first windows, the first of them cut if it is longer."""
        rows = -(-tokens // self._batches[0].shape[1])
        first = self._batches[0][:rows, :tokens]
        call = self._skeleton.record(self.position, first)
        return call.with_hidden(self._hidden[0][..., :rows, :tokens, :]) if self._hidden else call

    def held_out_sample(self, tokens: int) -> Call | None:
        """The same on the first of the windows that are held out, none of them cut; None where none are."""
        stop = min(self.windows, self.fitted + -(-tokens // self.window_length))
        return self.call_on(range(self.fitted, stop)) if self.fitted < self.windows else None

    @property
    def windows(self) -> int:
        return sum(map(len, self._batches))

    @property
    def fitted(self) -> int:
        """How many windows, the first ones, stages may be fitted on."""
        return sum(map(len, self._batches[: self._fitted]))

    @property
    def window_length(self) -> int:
        return int(self._batches[0].shape[1])

    def tokens_of(self, windows: Sequence[int]) -> Tensor:
        """(B, T) int64, those windows by their numbers."""
        return _chosen(self._batches, windows, 0)

    def call_on(self, windows: Sequence[int]) -> Call:
        """What the block at `position` is called with for those windows."""
        call = self._skeleton.record(self.position, self.tokens_of(windows))
        return call.with_hidden(_chosen(self._hidden, windows, -3)) if self._hidden else call

    def original_outputs(self, windows: Sequence[int]) -> Tensor:
        """(…, B, T, D) what the block at `position` puts out in the float stream; `know_originals` comes first."""
        assert self._next_originals, "nobody has asked for them"
        return _chosen(self._next_originals, windows, -3)

    def know_originals(self, block: Block, outputs: list[Tensor] | None) -> None:
        """Find out what `block` puts out in the float stream, if it is not known; `outputs` are that of each batch."""
        assert self._originals is not None, "there is no float stream"
        found = self._next_originals or outputs
        if not found:
            with block.originals():
                found = [block.run(call) for call in self._calls(self._originals)]
        self._next_originals = found

    def flow(self, block: Block, groups: Sequence[InputGroup]) -> Flow:
        """The text on its way through `block`, stopping in front of each group; hand its outputs to `advance`."""
        free = self._free_beside(block, groups)
        held = self._never_held is None and self._fits(block, groups, free)
        self._repeated += not held
        hidden = self._originals
        return Flow(
            block,
            groups,
            self.calls,
            None if hidden is None else lambda: self._calls(hidden),
            fitted=self._fitted,
            weights=self._token_weights,
            tokens_per_input=self._tokens_per_input,
            held=held,
            at_once=1 + max(0, free) // max(1, self._sums_bytes(groups)),
        )

    def _sums_bytes(self, groups: Sequence[InputGroup]) -> int:
        """What the statistics of one group take."""
        widest = max((group.in_features for group in groups), default=0)
        cross, held_out = CROSS_BYTES * (self._originals is not None), HELD_OUT_BYTES * (self._fitted is not None)
        return (GRAM_BYTES + cross + held_out) * widest**2

    def _free_beside(self, block: Block, groups: Sequence[InputGroup]) -> int:
        """What the block and the solver of its widest weights leave of the memory."""
        streams = 1 if self._originals is None else 2
        widest = max((group.in_features for group in groups), default=0)
        solver = SOLVER_BYTES * widest**2 + self._sums_bytes(groups) - GRAM_BYTES * widest**2
        return self._memory - solver - (BLOCK_COPIES_TO_QUANTIZE + streams - 1) * block.float_bytes

    def _fits(self, block: Block, groups: Sequence[InputGroup], free: int) -> bool:
        """Whether all activations fit into what is free; found on one window, as long as all are."""
        if free <= 0:
            return False
        streams, windows = 1 if self._originals is None else 2, sum(len(batch) for batch in self._batches)
        return streams * windows * held_bytes(block, groups, self.sample(self._batches[0].shape[1])) <= free

    def advance(
        self, block: Block, outputs: list[Tensor] | None = None, original_outputs: list[Tensor] | None = None
    ) -> None:
        """Stand in front of the next block, with what this one, quantized by now, puts out for each batch.

        Without the outputs of a stream the block is run for them, for the float stream as it was when it was entered.
        """
        hidden = self._run(block, self._hidden) if outputs is None else outputs
        if self._originals is not None:
            originals = self._next_originals or original_outputs
            if originals is None:
                with block.originals():
                    originals = self._run(block, self._originals)
            self._originals, self._next_originals = originals, None
        self._hidden = hidden
        self.position += 1

    def head_statistics(self) -> InputStats:
        """What the model's head is fed, all blocks being behind."""
        assert self._to_the_head and self.position == len(self._skeleton.blocks), "the text is not there yet"
        fed = zip(self._batches, self._hidden, strict=True)
        first = self._skeleton.head_input(*next(fed))
        stats = InputStats(first.shape[-1], first.device)
        judge = stats if self._fitted is None else stats.hold_out()
        stats.update(first)
        for batch, (tokens, hidden) in enumerate(fed, start=1):
            fits = self._fitted is None or batch < self._fitted
            (stats if fits else judge).update(self._skeleton.head_input(tokens, hidden))
        return stats

    def _run(self, block: Block, hidden: list[Tensor], *, keep: bool = False) -> list[Tensor]:
        outputs: list[Tensor] = []
        unneeded = self.position + 1 == len(self._skeleton.blocks) and not self._to_the_head
        for index, call in enumerate(() if unneeded else self._calls(hidden)):
            outputs.append(block.run(call))
            if hidden and not keep:
                hidden[index] = outputs[-1]  # the input is not needed again: do not hold both
        return outputs


def _chosen(batches: Sequence[Tensor], windows: Sequence[int], dimension: int) -> Tensor:
    """Those of all batches' windows that have these numbers; windows lie along `dimension`."""
    places = [(batch, row) for batch, each in enumerate(batches) for row in range(each.shape[dimension])]
    found = [batches[batch].narrow(dimension, row, 1) for batch, row in (places[window] for window in windows)]
    return torch.cat(found, dim=dimension)
