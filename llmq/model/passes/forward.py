"""Run a text through a model whose blocks are read one at a time, for its last hidden states.

Block by block over all batches, and not batch by batch over all blocks: each weight is read once.  What stays are the
hidden states of the whole text; with `Skeleton.logits` they give the logits of any part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton

MEMORY = torch.device("cpu")

Ready = Callable[[int], AbstractContextManager[Block]]
"""Index of a block -> a context in which it has its weights."""


def loaded(skeleton: Skeleton) -> Ready:
    """Blocks with the weights of their checkpoint, and none afterwards."""

    @contextmanager
    def ready(index: int) -> Iterator[Block]:
        block = skeleton.blocks[index]
        block.load()
        try:
            yield block
        finally:
            block.free()

    return ready


@torch.no_grad()
def through_blocks(
    skeleton: Skeleton,
    ready: Ready,
    batches: Sequence[Tensor],
    read: Callable[[int], Tensor],
    write: Callable[[int, Tensor], None],
) -> None:
    """Have the last block's output (…, B, T, D) written for each of `batches` (B, T) int64.

    read   the number of a batch -> what was written for it last, on any device
    write  takes the number of a batch, and what a block put out for it
    """
    for index in range(len(skeleton.blocks)):
        with ready(index) as block:
            for number, tokens in enumerate(batches):
                call = skeleton.record(index, tokens)
                if index > 0:
                    call = call.with_hidden(read(number).to(skeleton.device))
                write(number, block.run(call))


def hidden_states(skeleton: Skeleton, batches: Sequence[Tensor], *, keep: torch.device = MEMORY) -> list[Tensor]:
    """What the last block puts out, (…, B, T, D) in the dtype that it computes in, for each of `batches` (B, T) int64.

    `keep` is the device where they wait between two blocks, and where they end.
    """
    states: dict[int, Tensor] = {}

    def write(number: int, hidden: Tensor) -> None:
        states[number] = hidden.to(keep)

    through_blocks(skeleton, loaded(skeleton), batches, states.__getitem__, write)
    return [states[number] for number in range(len(batches))]
