"""Statistics in the order in which a block runs: both ways against full forwards, one for each group, in float64."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.model.analyse import input_groups
from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import BLOCK_COPIES, CROSS_BYTES, HELD_OUT_BYTES, SOLVER_BYTES, Stream
from llmq.model.passes.sequential import Flow, held_bytes
from llmq.numerics.input_stats import InputStats
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
    flow = stream.flow(block, input_groups.input_groups(block, stream.sample(24)))
    found = {}
    for group, stats in flow.statistics():
        found[group.names[0]] = stats
        spoil(block, group.names)
    stream.advance(block, flow.outputs)
    return found, [call.hidden for call in stream.calls()]


@pytest.mark.parametrize("name", NAMES)
def test_each_group_sees_what_those_before_it_became(checkpoint: Checkpoints, name: str) -> None:
    walked = skeleton_of(checkpoint(name))
    found, outputs = walk(walked, WAYS["held"])
    block = walked.blocks[0]
    block.load()  # the float weights again
    stream = Stream(walked, tokens(5, 24), batch=2)
    groups = input_groups.input_groups(block, stream.sample(24))
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
        torch.testing.assert_close(stats.second_moment().double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)
        spoil(block, group.names)
    for output, call in zip(outputs, stream.calls(), strict=True):
        assert torch.equal(output, block.run(call))


@pytest.mark.parametrize("name", NAMES)
def test_held_and_repeated_give_the_same_bits(checkpoint: Checkpoints, name: str) -> None:
    walked = skeleton_of(checkpoint(name))
    (held, held_outputs), (repeated, repeated_outputs) = (walk(walked, memory) for memory in WAYS.values())
    assert list(held) == list(repeated)
    for leader, stats in held.items():
        assert torch.equal(stats.second_moment(), repeated[leader].second_moment())
        assert torch.equal(stats.mean_absolute, repeated[leader].mean_absolute)
    assert all(torch.equal(a, b) for a, b in zip(held_outputs, repeated_outputs, strict=True))


def walk_both(walked: Skeleton, memory: int, *, held_out: int = 0) -> tuple[dict[str, InputStats], Stream]:
    """The first two blocks with the float stream beside, each group spoiled when its turn is over."""
    stream = Stream(walked, tokens(5, 24), batch=2, memory=memory, originals=True, held_out=held_out)
    found = {}
    for block in walked.blocks[:2]:
        block.load()
        stream.enter(block)
        flow = stream.flow(block, input_groups.input_groups(block, stream.sample(24)))
        for group, stats in flow.statistics():
            found[group.names[0]] = stats
            spoil(block, group.names)
        stream.advance(block, flow.outputs, flow.original_outputs)
    return found, stream


@pytest.mark.parametrize("name", ["llama", "stablelm", "falcon"])
def test_the_float_stream_is_what_the_float_model_does(checkpoint: Checkpoints, name: str) -> None:
    walked = skeleton_of(checkpoint(name))
    found, stream = walk_both(walked, WAYS["held"])
    quantized = Stream(walked, tokens(5, 24), batch=2)
    alone = Stream(walked, tokens(5, 24), batch=2)
    for block in walked.blocks[:2]:  # the slow twin: whole forwards of the float block, and of the spoilt one
        block.load()
        groups = input_groups.input_groups(block, alone.sample(24))
        kept: dict[str, list[Tensor]] = {group.names[0]: [] for group in groups}
        hooks = [
            block.linears[leader].register_forward_pre_hook(
                lambda _, args, here=here: here.append(args[0].flatten(0, -2))
            )
            for leader, here in kept.items()
        ]
        for call in alone.calls():
            block.run(call)
        X = {leader: torch.cat(here).double() for leader, here in kept.items()}
        alone.advance(block)
        for group in groups:
            kept[group.names[0]].clear()
            for call in quantized.calls():
                block.run(call)
            moved, original = torch.cat(kept[group.names[0]]).double(), X[group.names[0]]
            cross = found[group.names[0]].cross_moment()
            assert cross is not None
            torch.testing.assert_close(
                cross.double(),
                (original - moved).T @ moved / len(moved),
                rtol=1e-4,
                atol=1e-5 * float(moved.square().mean()),
            )
            spoil(block, group.names)
        for hook in hooks:
            hook.remove()
        quantized.advance(block)
    assert stream._originals is not None
    for ours, call in zip(stream._originals, alone.calls(), strict=True):
        assert torch.equal(ours, call.hidden)
    for ours, call in zip(stream._hidden, quantized.calls(), strict=True):
        assert torch.equal(ours, call.hidden)


@pytest.mark.parametrize("held_out", [0, 1, 2])
def test_both_streams_held_and_repeated_give_the_same_bits(checkpoint: Checkpoints, held_out: int) -> None:
    walked = skeleton_of(checkpoint("llama"))
    (held, one), (repeated, other) = (walk_both(walked, memory, held_out=held_out) for memory in WAYS.values())
    assert list(held) == list(repeated)
    for leader, stats in held.items():
        judges = (stats.held_out, repeated[leader].held_out)
        assert all(isinstance(judge, InputStats) is bool(held_out) for judge in judges)
        for ours, theirs in ((stats, repeated[leader]), judges)[: 1 + bool(held_out)]:
            assert ours is not None and theirs is not None
            for moment in ("hessian", "cross", "mean_absolute", *(("drift",) if ours is judges[0] else ())):
                assert torch.equal(getattr(ours, moment), getattr(theirs, moment))
    assert one._originals is not None and other._originals is not None
    assert all(torch.equal(a, b) for a, b in zip(one._originals, other._originals, strict=True))
    assert not other.notes == one.notes


@pytest.mark.parametrize("held_out", [1, 2, 3])
def test_the_last_windows_are_fitted_on_by_nothing(checkpoint: Checkpoints, held_out: int) -> None:
    walked = skeleton_of(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    groups = input_groups.input_groups(block, Stream(walked, tokens(5, 24), 2).sample(24))
    stream = Stream(walked, tokens(5, 24), batch=2, memory=WAYS["held"], held_out=held_out)
    ((_, found), *_) = stream.flow(block, groups).statistics()
    judge = found.held_out
    assert judge is not None and judge.cross_moment() is None
    for stats, windows in ((found, tokens(5, 24)[: 5 - held_out]), (judge, tokens(5, 24)[5 - held_out :])):
        alone = input_groups.statistics(block, groups, Stream(walked, windows, batch=2).calls())[groups[0]]
        assert stats.tokens == windows.numel() and torch.equal(stats.second_moment(), alone.second_moment())
    again = input_groups.statistics(block, groups, stream.fitted_calls())[groups[0]]
    assert torch.equal(again.second_moment(), found.second_moment())


def test_a_float_stream_is_carried_past_a_block_that_was_finished_earlier(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    _, stream = walk_both(walked, WAYS["held"])
    restored = Stream(walked, tokens(5, 24), batch=2, originals=True)
    for block in walked.blocks[:2]:
        block.load()
        restored.enter(block)
        spoil(block, tuple(block.linears))  # as if it was read back
        restored.advance(block)
    for ours, theirs in ((stream._hidden, restored._hidden), (stream._originals, restored._originals)):
        assert ours and theirs
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_originals_are_there_for_a_while_and_gone_with_the_block(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    block.keep_originals()
    (path, *_), before = block.linears, {name: p.clone() for name, p in block.module.named_parameters()}
    for parameter in block.module.parameters():
        parameter.data.mul_(2)
    with pytest.raises(KeyError), block.originals():
        assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())
        raise KeyError("anything")
    assert all(torch.equal(p, 2 * before[name]) for name, p in block.module.named_parameters())
    assert torch.equal(block.weight(path), 2 * before[f"{path.removeprefix(block.path + '.')}.weight"])
    block.free()
    assert not block._originals


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
    groups = input_groups.input_groups(block, Call((torch.randn(1, 6, 8),), {}))
    return Flow(block, groups, lambda: calls, held=held)


@pytest.mark.parametrize("held", [True, False])
def test_batches_that_take_another_way_are_waited_for(held: bool) -> None:
    flow = flow_of(branching(), [6, 3, 6], held=held)
    assert [stats.tokens for _, stats in flow.statistics()] == [15, 12, 15]
    if held:
        assert flow.outputs is not None
        assert [output.shape[1] for output in flow.outputs] == [6, 3, 6]
    else:
        assert flow.outputs is None, "the block is run batch by batch, and each input let go"


class Routing(nn.Module):
    """The second layer sees those tokens whose first channel is positive, as an expert does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        hidden[hidden[..., 0] > 0] += self.second(hidden[hidden[..., 0] > 0])
        return hidden


@pytest.mark.parametrize("held", [True, False])
def test_tokens_that_may_have_gone_elsewhere_are_not_paired(held: bool) -> None:
    model = BranchingModel()
    torch.manual_seed(0)
    model.blocks[0] = Routing()
    block = skeleton_in_memory(model).blocks[0]
    block.load()
    block.keep_originals()
    calls = [Call((torch.randn(1, 6, 8),), {}) for _ in range(3)]
    groups = input_groups.input_groups(block, calls[0])
    flow = Flow(block, groups, lambda: calls, lambda: calls, held=held)
    stats = [found for _, found in flow.statistics()]  # nothing is rounded, so the very same tokens come along
    assert [found.cross_moment() is None for found in stats] == [False, True]
    assert 0 < stats[1].tokens < 18


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


class Mixed(nn.Module):
    """The second layer runs in bfloat16, the last does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.second(hidden)
        return self.last(hidden.float())


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("broken_off", [False, True])
def test_forwards_that_stand_still_leave_torch_s_modes_alone(broken_off: bool) -> None:
    """Every forward is in no_grad, and these stop inside an autocast; both belong to the thread."""
    model = BranchingModel()
    model.blocks[0] = Mixed()
    walked = skeleton_in_memory(model)
    block = walked.blocks[0]
    block.load()
    flow = flow_of(block, [6, 6, 6], held=True)
    walking = flow.statistics()
    for _ in walking:
        assert modes() == (True, False)
        if broken_off:
            walking.close()
    assert modes() == (True, False)
    if not broken_off:
        torch.manual_seed(1)
        assert flow.outputs is not None
        for output in flow.outputs:
            assert torch.equal(output, block.run(Call((torch.randn(1, 6, 8),), {})))


class Eager(nn.Module):
    """Has its attention weights and its mask at hand in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, masks: dict[str, Tensor]) -> Tensor:
        values = self.first(hidden)  # (1, T, 8)
        weights = hidden @ hidden.mT + masks["full"]  # (1, T, T)
        mixed = weights @ values
        return self.last(mixed) + weights.sum()


def test_all_that_a_forward_has_at_hand_counts_as_held() -> None:
    model = BranchingModel()
    model.blocks[0] = Eager()
    block = skeleton_in_memory(model).blocks[0]
    block.load()
    T = 50
    mask = torch.zeros(T, T).expand(1, T, T)
    call = Call((torch.randn(2, T, 8)[:1],), {"masks": {"full": mask, "same": mask[:, :1]}})
    groups = input_groups.input_groups(block, call)
    assert held_bytes(block, groups, call) == 4 * (T * T + T * T + 3 * T * 8)  # weights, mask, hidden, values, mixed
    assert held_bytes(block, groups[:1], call) == 4 * (T * T + T * 8)


def test_forwards_are_held_where_they_fit(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    groups = input_groups.input_groups(block, Stream(walked, tokens(5, 24), 2).sample(24))
    held_by_all = 5 * held_bytes(block, groups, Stream(walked, tokens(5, 24), 2).sample(24))
    needed = held_by_all + SOLVER_BYTES * 64**2 + BLOCK_COPIES * block.float_bytes  # 64 inputs are the most: down_proj
    for memory, held in ((needed - 1, False), (needed, True)):
        stream = Stream(walked, tokens(5, 24), 2, memory)
        assert stream.flow(block, groups)._held is held
        more = (CROSS_BYTES + HELD_OUT_BYTES) * 64**2 + held_by_all + block.float_bytes
        both = Stream(walked, tokens(5, 24), 2, memory + more, originals=True, held_out=2)
        assert both.flow(block, groups)._held is held
        assert [note.partition(":")[2] for note in stream.notes] == (
            [] if held else [" the activations of all the text did not fit into memory at once"]
        )


def test_without_greenlet_the_work_is_repeated_and_the_user_is_told(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    walked = skeleton_of(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    stream = Stream(walked, tokens(5, 24), 2, WAYS["held"])
    assert not stream.notes
    assert not stream.flow(block, input_groups.input_groups(block, stream.sample(24)))._held
    assert ["greenlet" in note for note in stream.notes] == [True]
    assert len(walk(walked, WAYS["held"])[1]) == 3


@pytest.mark.parametrize("held", [True, False])
def test_an_error_in_the_block_reaches_the_caller(held: bool) -> None:
    flow = flow_of(branching(), [6], held=held)
    flow._block.module.second = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        for _ in flow.statistics():
            pass
