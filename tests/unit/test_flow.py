"""Statistics in the order in which a block runs: both ways against full forwards, one for each group, in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.model import observe
from llmq.model.block import Block
from llmq.model.flow import Flow
from llmq.model.skeleton import Call, Skeleton
from llmq.model.stream import Stream
from llmq.stats import InputStats
from tests.builders import skeleton_in_memory, skeleton_of, tokens

Checkpoints = Callable[..., Path]
WAYS = {"held": 1 << 40, "repeated": 0}  # bytes that may be held
NAMES = ["llama", "gemma3", "phi3", "stablelm", "neox", "falcon"]


def spoil(block: Block, paths: tuple[str, ...]) -> None:
    """Stands for rounding: what comes later in the block has to see it."""
    for path in paths:
        block.set_weight(path, block.weight(path) * 0.5)


def walk(walked: Skeleton, memory: int) -> tuple[dict[str, InputStats], list[Tensor]]:
    """(leader -> statistics, outputs of each batch) of the first block, each group spoiled when its turn is over."""
    block = walked.blocks[0]
    block.load()
    stream = Stream(walked, tokens(5, 24), batch=2, memory=memory)
    flow = stream.flow(block, observe.input_groups(block, stream.sample(24)))
    found = {}
    for group, stats in flow.statistics():
        found[group.names[0]] = stats
        spoil(block, group.names)
    return found, flow.outputs


@pytest.mark.parametrize("name", NAMES)
def test_each_group_sees_what_those_before_it_became(checkpoint: Checkpoints, name: str) -> None:
    walked = skeleton_of(checkpoint(name))
    found, outputs = walk(walked, WAYS["held"])
    block = walked.blocks[0]
    block.load()  # the float weights again
    stream = Stream(walked, tokens(5, 24), batch=2)
    groups = observe.input_groups(block, stream.sample(24))
    assert [group.names[0] for group in groups] == list(found)
    for group in groups:  # the slow twin: the whole block for every group
        inputs: list[Tensor] = []
        leader = block.linears[group.names[0]]
        handle = leader.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].flatten(0, -2)))
        for call in stream.calls():
            block.run(call)
        handle.remove()
        X = torch.cat(inputs).double()
        stats = found[group.names[0]]
        assert stats.tokens == len(X)
        torch.testing.assert_close(stats.hessian.double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)
        spoil(block, group.names)
    for output, call in zip(outputs, stream.calls(), strict=True):
        assert torch.equal(output, block.run(call))


@pytest.mark.parametrize("name", NAMES)
def test_held_and_repeated_give_the_same_bits(checkpoint: Checkpoints, name: str) -> None:
    walked = skeleton_of(checkpoint(name))
    (held, held_outputs), (repeated, repeated_outputs) = (walk(walked, memory) for memory in WAYS.values())
    assert list(held) == list(repeated)
    for leader, stats in held.items():
        assert torch.equal(stats.hessian, repeated[leader].hessian)
        assert torch.equal(stats.mean_absolute, repeated[leader].mean_absolute)
    assert all(torch.equal(a, b) for a, b in zip(held_outputs, repeated_outputs, strict=True))


class Branching(nn.Module):
    """Short texts go around the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        if hidden.shape[1] > 4:
            hidden = self.second(input=hidden + 1)  # by name, for once
        return self.last(hidden * 2)


class BranchingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Branching()])


def branching() -> Block:
    torch.manual_seed(0)
    walked = skeleton_in_memory(BranchingModel())
    walked.blocks[0].load()
    return walked.blocks[0]


def flow_of(block: Block, lengths: list[int], *, held: bool) -> Flow:
    torch.manual_seed(1)
    calls = [Call((torch.randn(1, length, 8),), {}) for length in lengths]
    groups = observe.input_groups(block, Call((torch.randn(1, 6, 8),), {}))
    return Flow(block, groups, lambda: calls, held=held)


@pytest.mark.parametrize("held", [True, False])
def test_batches_that_take_another_way_are_waited_for(held: bool) -> None:
    flow = flow_of(branching(), [6, 3, 6], held=held)
    assert [stats.tokens for _, stats in flow.statistics()] == [15, 12, 15]
    assert [output.shape[1] for output in flow.outputs] == [6, 3, 6]


@pytest.mark.parametrize("held", [True, False])
def test_a_layer_that_no_batch_reaches_has_seen_no_token(held: bool) -> None:
    flow = flow_of(branching(), [3, 2], held=held)
    assert [stats.tokens for _, stats in flow.statistics()] == [5, 0, 5]


@pytest.mark.parametrize("held", [True, False])
def test_a_walk_that_is_broken_off_leaves_the_block_as_it_was(held: bool) -> None:
    block = branching()
    walking = flow_of(block, [6, 6], held=held).statistics()
    next(walking)
    walking.close()
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert block.run(Call((torch.randn(1, 6, 8),), {})).shape == (1, 6, 8)


@pytest.mark.parametrize("held", [True, False])
def test_an_error_in_the_block_reaches_the_caller(held: bool) -> None:
    flow = flow_of(branching(), [6], held=held)
    flow._block.module.second = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        for _ in flow.statistics():
            pass
