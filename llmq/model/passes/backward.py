"""Backward pass through the blocks, which are read one at a time: the only loop from the last block to the first.

    tokens ─► block 0 ─► block 1 ─► … ─► hidden ─► head, loss      a tape keeps the input of each block
                 ◄────── ◄───────── … ◄─ gradient ◄──┘              one block's graph, its weights' gradients

In the backward pass a block is run again to build its graph; the gradient of its output is propagated to its weights
and its input. This is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) with blocks as segments, so memory
does not grow with the number of blocks, except for the hidden states between them.

The caller decides how a block gets its weights (`forward.Ready`). Hooks registered in this context are called in the
forward pass, and for the gradients of the backward pass.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import Ready, forward, loaded
from llmq.model.passes.hidden_states import HiddenStates, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.short_products import short_products
from llmq.model.passes.streams import Text

Graph = tuple[Tensor, Tensor]
"""The input of a block, which is a leaf, and its output, with the graph between them."""


class Tape:
    """A text on its way through the blocks and back, with the input of every block.

    weights  paths of the linear layers whose weights get a gradient
    seen     whether the calls for the same tokens were recorded before
    """

    def __init__(
        self,
        skeleton: Skeleton,
        text: Text,
        calls: RecordedCalls,
        storage: Storage,
        *,
        weights: Collection[str] = (),
        seen: bool = False,
    ) -> None:
        self.text = text
        self._skeleton, self._calls, self._storage = skeleton, calls, storage
        self._weights, self._seen = weights, seen
        self._inputs: list[HiddenStates] = []  # by block, and at the end the outputs of the last block

    def forward(self, ready: Ready = loaded, after: Callable[[Block], None] = lambda block: None) -> list[Tensor]:
        """The output (…, B, T, D) of the last block for each batch; `after` is called behind each block."""
        self._inputs.append(self._new_states(0))
        for batch in self.text.batches():
            embedded = self._calls.first(self.text.of(batch), seen=self._seen).hidden
            self._inputs[0].write(batch, embedded)

        def visit(block: Block) -> None:
            self._pass(block)
            after(block)

        forward(self._skeleton, visit, ready=ready)
        outputs = self._inputs.pop()
        return [outputs.read(batch) for batch in self.text.batches()]

    def retreat(self, block: Block, number: int, batch: range, gradient: Tensor) -> Tensor:
        """Propagate the gradient of a block's output back, for one batch; returns the gradient of its input."""
        parameters = self._parameters(block)
        graph = differentiable(block, self._call(block, batch), parameters)
        input_gradient, *weight_gradients = gradients_of(graph, parameters, gradient)
        for parameter, weight_gradient in zip(parameters, weight_gradients, strict=True):
            parameter.grad = weight_gradient
        return input_gradient

    def forget(self, block: Block) -> None:
        """Free the inputs and gradients of a block that the backward pass has finished."""
        self._inputs.pop().clear()
        for parameter in block.module.parameters():
            parameter.grad = None

    def _pass(self, block: Block) -> None:
        """Run one block on all batches. In a separate function, so that no local keeps its weights alive."""
        outputs = self._new_states(block.index + 1)
        for batch in self.text.batches():
            outputs.write(batch, block.run(self._call(block, batch)))
        self._inputs.append(outputs)

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
    visit: Callable[[Block, range, Tensor], None],
    *,
    ready: Ready = loaded,
) -> None:
    """Visit every block, the last one first, after each batch, with the gradient (…, B, T, D) of the block's input.

    The gradients of its weights are in their `grad`.

    `gradients` (…, B, T, D) are those of the loss in the output of the last block, per batch; they are overwritten.
    A visitor may change the block's weights.
    """
    for block in reversed(skeleton.blocks):
        with ready(block):
            if ready is loaded:
                skeleton.read_ahead(block.index - 1)
            for number, batch in enumerate(tape.text.batches()):
                gradients[number] = tape.retreat(block, number, batch, gradients[number])
                visit(block, batch, gradients[number])
            tape.forget(block)


def differentiable(block: Block, call: Call, weights: Iterable[Tensor] = (), *, of_input: bool = True) -> Graph:
    """The hidden state (…, B, T, D) of `call` as a leaf, and the output of the block, with the graph between them.

    The graph includes `weights`, and the leaf unless `of_input` is false. On some processors its products are in
    bfloat16 (`short_products.py`).
    """
    parameters = list(weights)
    with torch.enable_grad(), short_products(block.linears.values()):
        leaf = call.hidden.detach().requires_grad_(of_input)
        for parameter in parameters:
            parameter.requires_grad_(True)
        output = block.forward(call.with_hidden(leaf))
        for parameter in parameters:
            parameter.requires_grad_(False)
    return leaf, output


def gradients_of(graph: Graph, weights: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The gradients of the input, if it is in the graph, and of `weights`, from the gradient of the output.

    They are zeros for a weight that was not used.
    """
    leaf, output = graph
    tensors = [leaf, *weights] if leaf.requires_grad else list(weights)
    if not output.requires_grad:  # no weight was used
        return [torch.zeros_like(tensor) for tensor in tensors]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(output, tensors, gradient, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    return [torch.zeros_like(tensor) if g is None else g for g, tensor in zip(gradients, tensors, strict=True)]
