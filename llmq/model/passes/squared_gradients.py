"""Squared gradients of a loss in the outputs of every linear layer, token by token, in one pass there and one back.

    windows ─► block 0 ─► block 1 ─► … ─► hidden ─► slope       what each block was fed is kept
                  ◄────── ◄───────── … ◄──────────────┘         a block runs again for its graph
                    └ Σ_i (∂ℓ/∂y_ti)², for each linear layer

Blocks are on the outside and windows on the inside, so that a block is read twice for as many windows as there is
memory for the hidden states of: one of (…, T, D) a window and block.  Weights get no gradients, so the way back costs
about as much as the way there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import backward

Slope = Callable[[Tensor, Tensor], Tensor]
"""Numbers of windows (B,), and the last hidden states (…, B, T, D) -> the loss's gradient in these."""


def squared_gradients(
    skeleton: Skeleton, windows: Tensor, slope: Slope, *, batch: int, at_once: int
) -> dict[str, Tensor]:
    """For the path of each linear layer, (S, T) float32 on the CPU: the sum over its outputs, for `windows` (S, T).

    batch    windows that run together; another number may change bits
    at_once  windows whose hidden states are held, which changes none

    A layer that does not see every token in its place, such as an expert's, or whose gradients overflow, is left out.
    """
    found: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for part in torch.arange(len(windows)).split(max(1, at_once // batch) * batch):
        batches = part.split(batch)
        fed = _forward(skeleton, windows, batches)
        gradients = [slope(chosen, hidden) for chosen, hidden in zip(batches, fed.pop(), strict=True)]
        for index in reversed(range(len(skeleton.blocks))):
            block, inputs = skeleton.blocks[index], fed.pop()
            block.load()
            for number, chosen in enumerate(batches):
                with _watched(block) as seen:
                    call = skeleton.record(index, windows[chosen])
                    leaf, output = backward.forward(block, call, inputs[number])
                    (gradients[number],) = torch.autograd.grad(output, leaf, gradients[number])
                left_out.update(_add(found, seen, chosen, windows))
            block.free()
    return {path: sums for path, sums in found.items() if path not in left_out}


@torch.no_grad()
def _forward(skeleton: Skeleton, windows: Tensor, batches: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """The hidden states of each batch in front of each block, and behind the last."""
    states: list[list[Tensor]] = []
    for index, block in enumerate(skeleton.blocks):
        block.load()
        calls = [skeleton.record(index, windows[chosen]) for chosen in batches]
        if not states:
            states.append([call.hidden for call in calls])
        pairs = zip(calls, states[-1], strict=True)
        states.append([block.run(call.with_hidden(hidden)) for call, hidden in pairs])
        block.free()
    return states


@contextmanager
def _watched(block: Block) -> Iterator[dict[str, list[Tensor]]]:
    """While open, the squared gradients (…,) of every output of a linear layer that is gone back through, by path."""
    seen: dict[str, list[Tensor]] = {}

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(gradient: Tensor) -> None:
            seen.setdefault(path, []).append(gradient.to(torch.float32).square().sum(-1))

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:  # it depends on the hidden state
                output.register_hook(note)

        return hook

    handles = [linear.register_forward_hook(watch(path)) for path, linear in block.linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _add(found: dict[str, Tensor], seen: Mapping[str, list[Tensor]], chosen: Tensor, windows: Tensor) -> Iterator[str]:
    """Put what was seen of the windows `chosen` into `found`; yields the layers where that cannot be done."""
    for path, each in seen.items():
        sums = found.setdefault(path, torch.zeros(windows.shape, dtype=torch.float32))
        for squares in each:
            if squares.numel() != windows[chosen].numel() or not torch.isfinite(squares).all():
                yield path
            else:
                sums[chosen] += squares.reshape(-1, windows.shape[1]).cpu()
