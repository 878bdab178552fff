"""The calibration text on its way through the blocks: the only thing that lives across them.

After block i was quantized and run, a stream holds the hidden states in front of block i + 1: those that the quantized
blocks make, and, where a stage compares the two, those of the float model next to them.  What else a block is called
with is recorded (`recorded_calls.py`), and where hidden states lie is decided once (`hidden_states.py`), so memory does
not grow with the number of blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import HiddenStates, Storage
from llmq.model.passes.recorded_calls import RecordedCalls


@dataclass(frozen=True)
class Text:
    """Sequences of tokens, and how they are used.

    tokens      (S, T) int64
    batch       how many sequences run together; another number may change bits
    validation  how many of the last sequences nothing is fitted on
    """

    tokens: Tensor
    batch: int
    validation: int = 0

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    @property
    def fitted(self) -> int:
        """How many sequences, the first ones, stages may be fitted on."""
        return len(self.tokens) - self.validation

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    def batches(self) -> list[range]:
        """The sequences of each batch; no batch holds both fitted and validation sequences."""
        parts = ((0, self.fitted), (self.fitted, self.sequences))
        return [
            range(start, min(start + self.batch, end))
            for first, end in parts
            for start in range(first, end, self.batch)
        ]

    @property
    def fitted_batches(self) -> int:
        return -(-self.fitted // self.batch)

    def of(self, sequences: Sequence[int]) -> Tensor:
        """(B, T) int64, the tokens of some sequences."""
        if isinstance(sequences, range) and sequences.step == 1:
            return self.tokens[sequences.start : sequences.stop]
        return self.tokens[list(sequences)]


class Stream:
    """A text in front of block number `position`, as the blocks before that have left it.

    name        of the files in which its hidden states lie, if they lie in files
    to_the_end  whether anybody needs what the last block puts out
    """

    def __init__(
        self,
        skeleton: Skeleton,
        text: Text,
        calls: RecordedCalls,
        storage: Storage,
        name: str = "stream",
        *,
        to_the_end: bool = True,
    ) -> None:
        self.text = text
        self.position = 0
        self._to_the_end = to_the_end
        self._skeleton = skeleton
        self._calls = calls
        self._new_states: Callable[[int], HiddenStates] = lambda number: HiddenStates(storage, f"{name}-{number}")
        self._states = self._new_states(0)  # not used in front of the first block, whose hidden state is recorded
        self._next: HiddenStates | None = None  # behind the block, as far as it was run
        self._number = 0  # of the files of `_states`

    def call(self, sequences: Sequence[int]) -> Call:
        """What the block at `position` is called with for these sequences."""
        tokens = self.text.of(sequences)
        if self.position == 0:
            return self._calls.first(tokens)
        return self._calls.call(self.position, tokens, self._states.read(sequences))

    def calls(self) -> Iterator[Call]:
        """The same for each batch."""
        return map(self.call, self.text.batches())

    def fitted_calls(self) -> Iterator[Call]:
        """The same for each batch that stages may be fitted on."""
        return map(self.call, self.text.batches()[: self.text.fitted_batches])

    def sample(self, tokens: int) -> Call:
        """A call on about this many tokens, for probing: the first sequences, cut if the first one is longer."""
        rows = range(min(-(-tokens // self.text.length), len(self.text.batches()[0])))
        part = self.text.of(rows)[:, :tokens]
        if self.position == 0:
            return self._calls.first(part)
        return self._calls.call(self.position, part, self._states.read(rows)[..., :tokens, :])

    def validation_sample(self, tokens: int) -> Call | None:
        """A call on the first validation sequences, whole, of about this many tokens; None where there are none."""
        text = self.text
        stop = min(text.sequences, text.fitted + -(-tokens // text.length))
        return self.call(range(text.fitted, stop)) if text.validation else None

    def keep_inputs(self) -> None:
        """From now on `write` leaves what the block is fed readable, until the next block."""
        if self._next is None:
            self._next = self._new_states(1 - self._number)

    def write(self, sequences: Sequence[int], output: Tensor) -> None:
        """Note what the block put out (…, B, T, D); unless `keep_inputs` came first it takes the place of its input."""
        if self._next is None:
            self._next = self._states
        self._next.write(sequences, output)

    def outputs(self, sequences: Sequence[int]) -> Tensor:
        """(…, B, T, D) what the block put out, as `write` or `run` noted it."""
        assert self._next is not None, "the block was not run"
        return self._next.read(sequences)

    @property
    def has_outputs(self) -> bool:
        """Whether the block was run already."""
        return self._next is not None and bool(self._next)

    @property
    def needs_outputs(self) -> bool:
        """Whether anybody needs what the block at `position` puts out."""
        return self._to_the_end or self.position + 1 < len(self._skeleton.blocks)

    def run(self, block: Block) -> None:
        """Run a block on every batch, and note what it puts out, if that is needed."""
        for batch in self.text.batches() if self.needs_outputs else ():
            self.write(batch, block.run(self.call(batch)))

    def advance(self) -> None:
        """Stand in front of the next block, with what this one put out."""
        if self._next is not None and self._next is not self._states:
            self._states.clear()
            self._states, self._number = self._next, 1 - self._number
        self._next = None
        self.position += 1

    def past(self, block: Block) -> None:
        """Run a block, and stand in front of the next one."""
        self.run(block)
        self.advance()

    def last(self, sequences: Sequence[int]) -> Tensor:
        """(…, B, T, D) the last hidden states, when all blocks are behind."""
        assert self._to_the_end and self.position == len(self._skeleton.blocks), "the text is not there yet"
        return self._states.read(sequences)

    def clear(self) -> None:
        """Give the memory of all hidden states back."""
        self._states.clear()
        if self._next is not None:
            self._next.clear()
