"""Backward through the blocks of a model that are read one at a time: the only loop from the last block to the first.

    tokens ─► block 0 ─► block 1 ─► … ─► hidden ─► head, loss      a tape keeps what each block was fed
                 ◄────── ◄───────── … ◄─ gradient ◄──┘              one block's graph, its weights' gradients

On the way back a block is run again for its graph, the gradient of its output goes in, those of its weights and of its
input come out, and a visitor may change the block before the next is read (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174, with blocks as segments).  Where there is memory for all graphs they are kept, and no block runs
twice; both ways run the same operations, so they give the same bits.

How a block gets its weights is the caller's business (`forward.Ready`).  Hooks that such a context sets see the forward
pass, and the gradients of the backward one.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import Ready, forward, loaded
from llmq.model.passes.hidden_states import HiddenStates, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Text

Graph = tuple[Tensor, Tensor]
"""A block's input, a leaf, and its output, with the graph between them."""


class Tape:
    """A text on its way through the blocks and back, with what every block was fed.

    weights  paths of the linear layers whose weights get a gradient
    keep     keep the graphs of all blocks; `ready` may then not take a block's weights away between the two passes
    seen     whether the calls of these very tokens were recorded before
    """

    def __init__(
        self,
        skeleton: Skeleton,
        text: Text,
        calls: RecordedCalls,
        storage: Storage,
        *,
        weights: Collection[str] = (),
        keep: bool = False,
        seen: bool = False,
    ) -> None:
        self.text = text
        self._skeleton, self._calls, self._storage = skeleton, calls, storage
        self._weights, self._keep, self._seen = weights, keep, seen
        self._inputs: list[HiddenStates] = []  # of each block; one more than blocks, the last one's outputs
        self._graphs: dict[tuple[int, int], Graph] = {}  # by block and batch

    def forward(self, ready: Ready = loaded) -> list[Tensor]:
        """(…, B, T, D) what the last block puts out for each batch."""
        self._inputs.append(self._new_states(0))
        for batch in self.text.batches():
            embedded = self._calls.first(self.text.of(batch), seen=self._seen).hidden
            self._inputs[0].write(batch, embedded)
        forward(self._skeleton, self._pass, ready=ready)
        outputs = self._inputs.pop()
        return [outputs.read(batch) for batch in self.text.batches()]

    def retreat(self, block: Block, number: int, batch: range, gradient: Tensor) -> Tensor:
        """Back through one block with one batch; returns the gradient of its input."""
        parameters = self._parameters(block)
        graph = self._graphs.pop((block.index, number), None) or self._run(block, batch, parameters)
        for parameter in parameters:
            parameter.requires_grad_(True)
        of_input, *of_weights = torch.autograd.grad(graph[1], [graph[0], *parameters], gradient, allow_unused=True)
        for parameter, of_weight in zip(parameters, of_weights, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = of_weight
        return of_input

    def forget(self, block: Block) -> None:
        """Give back what is kept of a block that is behind."""
        self._inputs.pop().clear()
        for parameter in block.module.parameters():
            parameter.grad = None

    def _pass(self, block: Block) -> None:
        """Through one block.  A function of its own: no name may hold the block's graph, or weights, beyond it."""
        outputs = self._new_states(block.index + 1)
        for number, batch in enumerate(self.text.batches()):
            if self._weights:
                graph = self._run(block, batch, self._parameters(block))
                if self._keep:
                    self._graphs[block.index, number] = graph
                outputs.write(batch, graph[1].detach())
            else:
                outputs.write(batch, block.run(self._call(block, batch)))
        self._inputs.append(outputs)

    def _run(self, block: Block, batch: range, parameters: Iterable[Tensor]) -> Graph:
        return differentiable(block, self._call(block, batch), parameters)

    def _call(self, block: Block, batch: range) -> Call:
        hidden = self._inputs[block.index].read(batch)
        return self._calls.call(block.index, self.text.of(batch), hidden)

    def _parameters(self, block: Block) -> list[Tensor]:
        return [linear.weight for path, linear in block.linears.items() if path in self._weights]

    def _new_states(self, index: int) -> HiddenStates:
        return HiddenStates(self._storage, f"tape-{index}")


def backward(
    skeleton: Skeleton,
    tape: Tape,
    gradients: list[Tensor],
    visit: Callable[[Block, range], None],
    *,
    ready: Ready = loaded,
) -> None:
    """Visit every block, the last one first, after each batch, with the gradients of its weights in their `grad`.

    `gradients` (…, B, T, D) are those of the loss in what the last block put out, batch by batch; they are used up.
    A visitor may change the block's weights.
    """
    for block in reversed(skeleton.blocks):
        with ready(block):
            if ready is loaded:
                skeleton.read_ahead(block.index - 1)
            for number, batch in enumerate(tape.text.batches()):
                gradients[number] = tape.retreat(block, number, batch, gradients[number])
                visit(block, batch)
            tape.forget(block)


def differentiable(block: Block, call: Call, weights: Iterable[Tensor] = ()) -> Graph:
    """The hidden state (…, B, T, D) of `call` as a leaf, and what the block makes of it.

    Between them lies the graph, which goes through `weights` as well.
    """
    parameters = list(weights)
    with torch.enable_grad():
        fed = call.hidden.detach().requires_grad_(True)
        for parameter in parameters:
            parameter.requires_grad_(True)
        output = block.forward(call.with_hidden(fed))
        for parameter in parameters:
            parameter.requires_grad_(False)
    return fed, output


def graph_bytes(block: Block, call: Call, weights: Iterable[Tensor]) -> int:
    """What `differentiable` keeps in memory for the way back, the block's parameters not counted; found by running
    it.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, output = differentiable(block, call, weights)
    for parameter in block.module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()) + output.nbytes
