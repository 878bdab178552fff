"""Forward through the blocks of a model that are read one at a time: the only loop from the first block to the last.

What happens at a block is a visitor's business: `Stream.past` takes a text past it, the pipeline quantizes it first.
Each block is read once for all of the text, and the next one is read while this one is at work.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Text

Ready = Callable[[Block], AbstractContextManager[None]]
"""A block -> a context in which it has its weights."""


@contextmanager
def loaded(block: Block) -> Iterator[None]:
    """While open, a block has the weights of its checkpoint."""
    block.load()
    try:
        yield
    finally:
        block.free()


def forward(skeleton: Skeleton, visit: Callable[[Block], None], *, ready: Ready = loaded) -> None:
    """Visit every block, in order, while it has its weights."""
    for block in skeleton.blocks:
        with ready(block):
            if ready is loaded:
                skeleton.read_ahead(block.index + 1)
            visit(block)


@torch.no_grad()
def run_through(
    skeleton: Skeleton, text: Text, storage: Storage, calls: RecordedCalls | None = None, *, ready: Ready = loaded
) -> Stream:
    """A text behind the last block; `Stream.last` gives its hidden states there."""
    stream = Stream(skeleton, text, calls or RecordedCalls(skeleton), storage)
    forward(skeleton, stream.past, ready=ready)
    return stream
