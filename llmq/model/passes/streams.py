"""The calibration text on its way through the blocks: the only data that is kept from one block to the next.

After block i was quantized and run, a stream holds the hidden states before block i + 1. There is one stream with those
of the quantized blocks, and, if a stage compares the two, a second one with those of the float model. All other
arguments of a block are recorded (`recorded_calls.py`), and one policy decides where hidden states are kept
(`hidden_states.py`), so memory does not grow with the number of blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.distributed.ranks import ALONE, Ranks
from llmq.errors import ConfigError
from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import HiddenStates, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.statistics import TokenWeights

REPEATED = (
    "{blocks} blocks took about twice the time, because the activations of the whole text did not fit into memory and "
    "were computed again"
)


@dataclass(frozen=True)
class Text:
    """Sequences of tokens, and how they are used.

    tokens      (S, T) int64
    batch       number of sequences that run together; another number may change the last bits
    validation  number of sequences, the last ones, on which nothing is fitted
    in_parts    whether each batch goes through a block in parts of `unit` sequences, in half the memory. Statistics are
                summed by units in any case, so this changes no sum
    whole       the text of all ranks, if this is the share of one of them; `numbers` are its sequences in it
    """

    tokens: Tensor
    batch: int
    validation: int = 0
    whole: "Text | None" = None
    numbers: Sequence[int] = ()
    in_parts: bool = False

    @property
    def unit(self) -> int:
        """The number of sequences whose tokens are summed at once in statistics: half a batch."""
        return max(1, self.batch // 2)

    def share(self, ranks: Ranks) -> "Text":
        """The sequences of this rank: a part of the fitted ones, and a part of the validation sequences.

        Raises ConfigError if there are fewer fitted sequences than ranks.
        """
        if ranks.size == 1:
            return self
        if self.fitted < ranks.size:
            raise ConfigError(
                f"{self.fitted} calibration sequences cannot be divided between {ranks.size} processes",
                hint="start fewer processes, or use more sequences (--samples)",
            )
        validation = [self.fitted + number for number in ranks.part(self.validation, self.batch)]
        numbers = [*ranks.part(self.fitted, self.batch), *validation]
        return Text(self.tokens[numbers], self.batch, len(validation), self, numbers)

    @property
    def validates(self) -> bool:
        """Whether there are validation sequences, of this rank or of others."""
        return (self.whole or self).validation > 0

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    @property
    def fitted(self) -> int:
        """The number of sequences, the first ones, on which stages may be fitted."""
        return len(self.tokens) - self.validation

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    def batches(self) -> list[range]:
        """The sequences of each batch; no batch has both fitted and validation sequences."""
        return [*self._batches(0, self.fitted), *self._batches(self.fitted, self.sequences)]

    def _batches(self, first: int, end: int) -> Iterator[range]:
        for start in range(first, end, self.batch):
            stop = min(start + self.batch, end)
            size = self.unit if self.in_parts else self.batch
            yield from (range(part, min(part + size, stop)) for part in range(start, stop, size))

    @property
    def fitted_batches(self) -> int:
        return len(list(self._batches(0, self.fitted)))

    def of(self, sequences: Sequence[int]) -> Tensor:
        """(B, T) int64, the tokens of some sequences."""
        if isinstance(sequences, range) and sequences.step == 1:
            return self.tokens[sequences.start : sequences.stop]
        return self.tokens[list(sequences)]


class Stream:
    """A text before block number `position`: its hidden states after the earlier blocks.

    name        name of the files with the hidden states, if they are kept in files
    to_the_end  whether the outputs of the last block are needed
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
        self.recorded = calls
        self._storage, self._name = storage, name
        self._new_states: Callable[[int], HiddenStates] = lambda number: HiddenStates(storage, f"{name}-{number}")
        self._states = self._new_states(0)  # not used before the first block, whose hidden state is recorded
        self._next: HiddenStates | None = None  # the outputs of the block, for the batches that were run
        self._number = 0  # the number in the file name of `_states`

    def call(self, sequences: Sequence[int]) -> Call:
        """The call of the block at `position` for these sequences."""
        tokens = self.text.of(sequences)
        if self.position == 0:
            return self.recorded.first(tokens)
        return self.recorded.call(self.position, tokens, self._states.read(sequences))

    def calls(self) -> Iterator[Call]:
        """The call of the block at `position` for each batch."""
        return map(self.call, self.text.batches())

    def fitted_calls(self) -> Iterator[Call]:
        """The call of the block at `position` for each fitted batch."""
        return map(self.call, self.text.batches()[: self.text.fitted_batches])

    def sample(self, tokens: int, ranks: Ranks = ALONE) -> Call:
        """A call with about this many tokens: the first sequences of all `ranks`, which must all call it."""
        count = min(-(-tokens // self.text.length), self.text.batch)
        return self._first(range(self.text.fitted or self.text.sequences), count, tokens, ranks)

    def validation_sample(self, tokens: int, ranks: Ranks = ALONE) -> Call | None:
        """As `sample`, of whole validation sequences; None if there are none."""
        text, rows = self.text, range(self.text.fitted, self.text.sequences)
        exist = text.validation if ranks.size == 1 else text.validates
        return self._first(rows, -(-tokens // text.length), text.length, ranks) if exist else None

    def _first(self, rows: range, count: int, tokens: int, ranks: Ranks) -> Call:
        """The call of the first `count` sequences among the `rows` of all ranks, cut to some tokens."""
        own = rows[:count]
        states = self._states.read(own)[..., :tokens, :] if self.position and own else None
        parts = [part for part in ranks.all((self.text.of(own)[:, :tokens], states)) if len(part[0])]
        sequences = torch.cat([part for part, _ in parts])[:count]
        if not self.position:
            return self.recorded.first(sequences)
        hidden = torch.cat([states for _, states in parts if states is not None], dim=-3)[..., :count, :, :]
        return self.recorded.call(self.position, sequences, hidden)

    def keep_inputs(self) -> None:
        """From now on, and until `advance`, `write` keeps the inputs of the block readable."""
        if self._next is None:
            self._next = self._new_states(1 - self._number)

    def write(self, sequences: Sequence[int], output: Tensor) -> None:
        """Store the output of the block (…, B, T, D); it overwrites the input unless `keep_inputs` was called."""
        if self._next is None:
            self._next = self._states
        self._next.write(sequences, output)

    def outputs(self, sequences: Sequence[int]) -> Tensor:
        """(…, B, T, D) the output of the block that `write` or `run` has stored."""
        assert self._next is not None, "the block was not run"
        return self._next.read(sequences)

    @property
    def has_outputs(self) -> bool:
        """Whether outputs of the block are stored."""
        return self._next is not None and bool(self._next)

    @property
    def needs_outputs(self) -> bool:
        """Whether the outputs of the block at `position` are needed."""
        return self._to_the_end or self.position + 1 < len(self._skeleton.blocks)

    def run(self, block: Block) -> None:
        """Run a block on every batch and store its outputs, if they are needed."""
        for batch in self.text.batches() if self.needs_outputs else ():
            self.write(batch, block.run(self.call(batch)))

    def advance(self) -> None:
        """Move to the next block; the outputs of this one become its inputs."""
        if self._next is not None and self._next is not self._states:
            self._states.clear()
            self._states, self._number = self._next, 1 - self._number
        self._next = None
        self.position += 1

    def past(self, block: Block) -> None:
        """Run a block, and move to the next one."""
        self.run(block)
        self.advance()

    def last(self, sequences: Sequence[int]) -> Tensor:
        """(…, B, T, D) the last hidden states, when the text has passed all blocks."""
        assert self._to_the_end and self.position == len(self._skeleton.blocks), "the text has not passed all blocks"
        return self._states.read(sequences)

    def gather(self, ranks: Ranks) -> None:
        """The first rank gets the hidden states of all ranks, and the whole text; all others drop theirs."""
        whole = self.text.whole
        if whole is None:
            return
        nbytes = whole.sequences * self._skeleton.hidden_bytes(whole.length)
        storage = Storage.choose(nbytes, self._skeleton.device, self._storage.folder)
        states, own = HiddenStates(storage, f"{self._name}-whole"), self.text.batches()
        for turn in range(-ranks.least(-len(own))):  # as many as the rank with the most batches has
            sent = [self.text.numbers[i] for i in own[turn]] if turn < len(own) else []
            for numbers, hidden in ranks.all((sent, self._states.read(own[turn]) if sent else None)):
                if ranks.is_first and hidden is not None:
                    states.write(numbers, hidden)
        self.clear()
        self._states, self.text = states, whole

    def clear(self) -> None:
        """Free the memory, or delete the files, of all hidden states."""
        self._states.clear()
        if self._next is not None:
            self._next.clear()


@dataclass
class Streams:
    """The calibration text on its way through the blocks.

    quantized         the hidden states of the quantized model
    floats            the hidden states of the float model; None if no stage compares the two
    token_weights     the weight of each token in the statistics of a group
    tokens_per_input  minimum number of tokens in the statistics of an expert, per input of its layers
    memory            free bytes. Activations may use what blocks and solver leave of it, to avoid repeated work
    repeated          number of blocks whose activations did not fit
    ranks             the processes that share the text; this one has a part of it
    """

    quantized: Stream
    floats: Stream | None = None
    token_weights: TokenWeights | None = None
    tokens_per_input: float = 0.0
    memory: int = 0
    repeated: int = 0
    ranks: Ranks = ALONE

    @property
    def text(self) -> Text:
        return self.quantized.text

    @property
    def recorded(self) -> RecordedCalls:
        """The arguments of the blocks for this text."""
        return self.quantized.recorded

    @property
    def notes(self) -> list[str]:
        """Notes for the user."""
        return [REPEATED.format(blocks=self.repeated)] if self.repeated else []

    def enter(self, block: Block) -> None:
        """Must be called when `block` is loaded, before it is changed: keeps its float weights if they are needed."""
        if self.floats is not None:
            block.keep_originals()

    def transformed(self, block: Block) -> None:
        """Must be called when `block` was rewritten into an equal one, whose weights are the originals from now on.

        The two are equal except for rounding errors, so the float stream continues with the output of the block before
        the rewrite: a resumed run can only read that block, and must produce the same bytes.
        """
        if self.floats is not None:
            self.floats.keep_inputs()
            with block.originals():
                self.floats.run(block)
            block.keep_originals()

    def run_floats(self, block: Block) -> None:
        """Run the float stream through the float `block`, if this has not happened yet."""
        if self.floats is not None and not self.floats.has_outputs:
            with block.originals():
                self.floats.run(block)

    def advance(self) -> None:
        """Move to the next block, with the outputs of this one."""
        self.quantized.advance()
        if self.floats is not None:
            self.floats.advance()

    def gather(self) -> None:
        """When the text has passed all blocks: the first rank gets the whole text, and its float states."""
        if self.floats is not None:
            self.floats.gather(self.ranks)
            self.quantized.text = self.floats.text

    def past(self, block: Block) -> None:
        """Run a block whose weights are final, and move to the next one."""
        self.run_floats(block)
        self.quantized.run(block)
        self.advance()
