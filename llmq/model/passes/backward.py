"""Forward and backward through the whole model, one block at a time.

    tokens ─► block 0 ─► block 1 ─► … ─► hidden ─► head, loss      hidden state of each block's input kept
                 ◄────── ◄───────── … ◄─ gradient ◄──┘              one block's graph, its weights' gradients

The forward pass keeps what each block was fed.  The backward pass goes through the blocks in reverse: a block is run
again for its graph, the gradient of its output goes in, those of its weights and of its input come out, and the caller
may change the block and let go of it before the next is asked for (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174, with blocks as segments).  Where there is memory for all graphs they are kept, and no block runs
twice; both ways run the same operations, so they give the same bits.

What has to happen so that a block has its weights is the caller's business: `ready(index)` is a context in which it has
them.  Hooks that such a context sets see the forward pass, and the gradients of the backward one.
"""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import Ready


class Chain:
    """One batch of tokens (B, T) int64 on its way through the blocks and back; made once for each.

    weights   paths of the linear layers whose weights get a gradient
    keep      keep the graphs of all blocks; `ready` may then not take a block's weights away between the two passes
    hidden    (…, B, T, D) what the last block put out
    """

    def __init__(
        self, skeleton: Skeleton, ready: Ready, tokens: Tensor, weights: Collection[str] = (), *, keep: bool = False
    ) -> None:
        self._ready = ready
        self._weights = weights
        self._calls = skeleton.record_all(tokens)
        self._kept: list[tuple[Tensor, Tensor]] = []  # each block's input and output, the graph between them
        self._inputs: list[Tensor] = []
        self.hidden = self._calls[0].hidden
        for index in range(len(self._calls)):
            self._advance(index, keep)

    def _advance(self, index: int, keep: bool) -> None:
        """Through one block.  A function of its own: no name may hold the block's graph, or weights, beyond it."""
        with self._ready(index) as block:
            passed = forward(block, self._calls[index], self.hidden, self._wanted(block))
        if keep:
            self._kept.append(passed)
        self._inputs.append(self.hidden)
        self.hidden = passed[1].detach()

    def backward(self, gradient: Tensor) -> Iterator[tuple[int, Block]]:
        """Each block from the last to the first, with the gradients of its weights in their `grad`.

        `gradient` (…, B, T, D) is that of the loss in `hidden`.  A block's weights may be changed while it is held, and
        their gradients are gone when the next is asked for.
        """
        for index in reversed(range(len(self._calls))):
            with self._ready(index) as block:
                gradient = self._retreat(index, block, gradient)
                yield index, block
                for parameter in block.module.parameters():
                    parameter.grad = None
                del parameter

    def _retreat(self, index: int, block: Block, gradient: Tensor) -> Tensor:
        """Back through one block; returns the gradient of its input."""
        wanted, hidden = self._wanted(block), self._inputs.pop()
        fed, output = self._kept.pop() if self._kept else forward(block, self._calls[index], hidden, wanted)
        for parameter in wanted:
            parameter.requires_grad_(True)
        of_input, *found = torch.autograd.grad(output, [fed, *wanted], gradient, allow_unused=True)
        for parameter, of_loss in zip(wanted, found, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = of_loss
        return of_input

    def _wanted(self, block: Block) -> list[Tensor]:
        return [linear.weight for path, linear in block.linears.items() if path in self._weights]


def forward(block: Block, call: Call, hidden: Tensor, weights: Iterable[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """`hidden` (…, B, T, D) as a leaf, and what the block makes of it, with the graph between them and `weights`."""
    parameters = list(weights)
    with torch.enable_grad():
        fed = hidden.detach().requires_grad_(True)
        for parameter in parameters:
            parameter.requires_grad_(True)
        output = block.forward(call.with_hidden(fed))
        for parameter in parameters:
            parameter.requires_grad_(False)
    return fed, output


def graph_bytes(block: Block, call: Call, weights: Iterable[Tensor]) -> int:
    """What `forward` keeps in memory for the way back, the block's parameters not counted; found by running it."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, output = forward(block, call, call.hidden, weights)
    for parameter in block.module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()) + output.nbytes
