"""The calibration text on its way through the blocks: the only thing that lives across them.

After block i was quantized and run, the stream holds the hidden states that the quantized prefix makes, one tensor
(…, B, T, D) a batch.  What else block i + 1 is called with is recorded when it is needed and not kept, so memory does
not grow with the number of blocks, whatever masks or per-layer inputs a model has.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from llmq.model.block import Block
from llmq.model.flow import Flow, held_bytes, why_not_held
from llmq.model.observe import InputGroup
from llmq.model.skeleton import Call, Skeleton

SOLVER_BYTES = 24  # for each entry of a Hessian: its sum, the mean, the factor in float64, the factor in float32
BLOCK_COPIES = 3  # a block's weights in float32 as they are loaded, rounded and compared


class Stream:
    """The windows (S, T) int64 in batches, and where they are: in front of block `position`.

    `memory` is how many bytes are free.  Of what the blocks and the solver leave of it, activations may take as much as
    they need to spare repeated work (see `flow.py`).
    """

    def __init__(self, skeleton: Skeleton, windows: Tensor, batch: int, memory: int = 0) -> None:
        self._skeleton = skeleton
        self._batches = windows.split(batch)
        self._never_held = why_not_held()
        self._memory = memory
        self._repeated = 0  # blocks whose activations did not fit
        self._hidden: list[Tensor] = []  # empty in front of the first block, whose hidden state is recorded
        self.position = 0

    @property
    def notes(self) -> list[str]:
        """What a user should know of the way that was taken."""
        if not self._repeated:
            return []
        reason = self._never_held or "the activations of all the text did not fit into memory at once"
        return [f"{self._repeated} blocks took about twice the time, computing the same numbers again: {reason}"]

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
        """The text on its way through `block`, stopping in front of each group; hand its outputs to `advance`."""
        held = self._never_held is None and self._fits(block, groups)
        self._repeated += not held
        return Flow(block, groups, self.calls, held=held)

    def _fits(self, block: Block, groups: Sequence[InputGroup]) -> bool:
        """Whether all activations fit beside the block and the solver; found on one window, as long as all are."""
        widest = max((group.in_features for group in groups), default=0)
        left = self._memory - SOLVER_BYTES * widest**2 - BLOCK_COPIES * block.float_bytes
        if left <= 0:
            return False
        windows = sum(len(batch) for batch in self._batches)
        return windows * held_bytes(block, groups, self.sample(self._batches[0].shape[1])) <= left

    def advance(self, block: Block, outputs: list[Tensor] | None = None) -> None:
        """Stand in front of the next block, with what this one, quantized by now, puts out for each batch.

        Without `outputs` the block is run for them.
        """
        self._hidden = self._run(block) if outputs is None else outputs
        self.position += 1

    def _run(self, block: Block) -> list[Tensor]:
        outputs: list[Tensor] = []
        last = self.position + 1 == len(self._skeleton.blocks)
        for index, call in enumerate(() if last else self.calls()):
            outputs.append(block.run(call))
            if self._hidden:
                self._hidden[index] = outputs[-1]  # the input is not needed again: do not hold both
        return outputs
