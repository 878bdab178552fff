"""Forward pass through the blocks, which are read one at a time: the only loop from the first block to the last.

A visitor decides what happens at a block: `Stream.past` runs a text through it, the pipeline quantizes it first. Each
block is read once for the whole text, and the next one is read while this one is processed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from llmq import memory
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Text

Ready = Callable[[Block], AbstractContextManager[None]]
"""A block -> a context in which the block has its weights."""


@contextmanager
def loaded(block: Block) -> Iterator[None]:
    """While open, a block has the weights of the checkpoint."""
    try:
        block.load()
        yield
    finally:
        block.free()
        memory.give_back()


def forward(skeleton: Skeleton, visit: Callable[[Block], None], *, ready: Ready = loaded) -> None:
    """Visit every block, in order, while it has its weights."""
    for block in skeleton.blocks:
        with ready(block):
            if ready is loaded:
                skeleton.read_ahead(block.index + 1)
            visit(block)


@torch.no_grad()
def run_through(
    skeleton: Skeleton,
    text: Text,
    storage: Storage,
    calls: RecordedCalls | None = None,
    *,
    ready: Ready = loaded,
    after: Callable[[Block], None] = lambda block: None,
) -> Stream:
    """Run a text through all blocks, and call `after` behind each; `Stream.last` gives its last hidden states."""
    stream = Stream(skeleton, text, calls or RecordedCalls(skeleton), storage)

    def visit(block: Block) -> None:
        stream.past(block)
        after(block)

    forward(skeleton, visit, ready=ready)
    return stream
