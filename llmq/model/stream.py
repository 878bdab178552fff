"""The calibration text on its way through the blocks: the only thing that lives across them.

After block i was quantized and run, the stream holds the hidden states that the quantized prefix makes, one tensor
(…, B, T, D) a batch.  What else block i + 1 is called with is recorded when it is needed and not kept, so memory does
not grow with the number of blocks, whatever masks or per-layer inputs a model has.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from llmq.model.block import Block
from llmq.model.flow import Flow, held_bytes
from llmq.model.observe import InputGroup
from llmq.model.skeleton import Call, Skeleton


class Stream:
    """The windows (S, T) int64 in batches, and where they are: in front of block `position`.

    `memory` is how many bytes of activations may be held to spare repeated work (see `flow.py`).
    """

    def __init__(self, skeleton: Skeleton, windows: Tensor, batch: int, memory: int = 0) -> None:
        self._skeleton = skeleton
        self._batches = windows.split(batch)
        self._memory = memory
        self._hidden: list[Tensor] = []  # empty in front of the first block, whose hidden state is recorded
        self.position = 0

    def calls(self) -> Iterator[Call]:
        """For each batch, what the block at `position` is called with."""
        for index, tokens in enumerate(self._batches):
            call = self._skeleton.record(self.position, tokens)
            yield call.with_hidden(self._hidden[index]) if self._hidden else call

    def sample(self, tokens: int) -> Call:
        """A call on about so many tokens, for probing: the first windows, the first of them cut if it is longer."""
        rows = -(-tokens // self._batches[0].shape[1])
        first = self._batches[0][:rows, :tokens]
        call = self._skeleton.record(self.position, first)
        return call.with_hidden(self._hidden[0][..., :rows, :tokens, :]) if self._hidden else call

    def flow(self, block: Block, groups: Sequence[InputGroup]) -> Flow:
        """The text on its way through `block`, stopping in front of each group; hand its outputs to `take`."""
        tokens = sum(batch.numel() for batch in self._batches)
        held = held_bytes(block, groups, tokens) <= self._memory
        return Flow(block, groups, self.calls, held=held)

    def take(self, outputs: list[Tensor]) -> None:
        """Stand in front of the next block, with what the one before put out for each batch."""
        self._hidden = outputs
        self.position += 1

    def advance(self, block: Block) -> None:
        """Run the block, quantized by now, and stand in front of the next one."""
        outputs = []
        last = self.position + 1 == len(self._skeleton.blocks)
        for index, call in enumerate(() if last else self.calls()):
            outputs.append(block.run(call))
            if self._hidden:
                self._hidden[index] = outputs[-1]  # the input is not needed again: do not hold both
        self.take(outputs)
