"""Statistics in the order in which a block runs: both ways against full forwards, one for each group, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.memory import HOST
from llmq.model.analyse import input_groups
from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.sequential import Sequential, kept_bytes
from llmq.model.passes.statistics import stops_of
from llmq.model.passes.streams import REPEATED as REPEATED_NOTE
from llmq.model.passes.streams import Streams
from llmq.numerics.input_stats import InputStats
from tests.builders import skeleton_in_memory, skeleton_of, tokens
from tests.passes import REMEMBERED, REPEATED, Stack, halve, run_block, states_of, stream_over, streams_over

Checkpoints = Callable[..., Path]
NAMES = ["llama", "gemma3", "phi3", "stablelm", "neox", "falcon"]
WAYS = pytest.mark.parametrize("memory", [REMEMBERED, REPEATED])


def spoil(block: Block, paths: tuple[str, ...]) -> None:
    for path in paths:
        block.set_weight(path, block.weight(path) * 0.5)


def run_first(skeleton: Skeleton, memory: int) -> tuple[dict[str, InputStats], list[Tensor]]:
    """(leader -> statistics, outputs of each batch) of the first block."""
    streams = streams_over(skeleton, tokens(5, 24), memory=memory)
    stats = run_block(streams, skeleton.blocks[0])
    return stats, states_of(streams.quantized)


@pytest.mark.parametrize("name", NAMES)
def test_each_group_sees_quantized_groups_before_it(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    seen, outputs = run_first(skeleton, REMEMBERED)
    block = skeleton.blocks[0]
    block.load()  # the float weights again
    stream = stream_over(skeleton, tokens(5, 24))
    groups = input_groups.input_groups(block, stream.sample(24))
    assert [group.names[0] for group in groups] == list(seen)
    for group in groups:  # the slow twin: the whole block for every group
        inputs: list[Tensor] = []
        leader = block.linears[group.names[0]]
        handle = leader.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].flatten(0, -2)))
        for call in stream.calls():
            block.run(call)
        handle.remove()
        X = torch.cat(inputs).double()
        stats = seen[group.names[0]]
        assert stats.tokens == len(X)
        torch.testing.assert_close(stats.second_moment().double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)
        halve(block, group)
    for output, call in zip(outputs, stream.calls(), strict=True):
        assert torch.equal(output, block.run(call))


@pytest.mark.parametrize("name", NAMES)
def test_remembered_and_repeated_forwards_agree_bitwise(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    (kept, outputs), (again, other_outputs) = (run_first(skeleton, memory) for memory in (REMEMBERED, REPEATED))
    assert list(kept) == list(again)
    for leader, stats in kept.items():
        assert torch.equal(stats.second_moment(), again[leader].second_moment())
        assert torch.equal(stats.mean_absolute, again[leader].mean_absolute)
    assert all(torch.equal(a, b) for a, b in zip(outputs, other_outputs, strict=True))


def run_both(
    skeleton: Skeleton, memory: int, *, validation: int = 0, storage: Storage | None = None
) -> tuple[dict[str, InputStats], Streams]:
    """The first two blocks with the float stream next to the quantized one."""
    kinds = {} if storage is None else {"storage": storage}
    streams = streams_over(skeleton, tokens(5, 24), memory=memory, floats=True, validation=validation, **kinds)
    seen = {}
    for block in skeleton.blocks[:2]:
        seen |= run_block(streams, block)
    return seen, streams


def float_states(streams: Streams) -> list[Tensor]:
    assert streams.floats is not None
    return states_of(streams.floats)


@pytest.mark.parametrize("name", ["llama", "stablelm", "falcon"])
def test_float_stream_equals_the_float_model(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    seen, streams = run_both(skeleton, REMEMBERED)
    quantized, alone = (stream_over(skeleton, tokens(5, 24)) for _ in range(2))
    for block in skeleton.blocks[:2]:  # the slow twin: whole forwards of the float block, and of the spoilt one
        block.load()
        groups = input_groups.input_groups(block, alone.sample(24))
        kept: dict[str, list[Tensor]] = {group.names[0]: [] for group in groups}
        hooks = [
            block.linears[leader].register_forward_pre_hook(
                lambda _, args, here=here: here.append(args[0].flatten(0, -2))
            )
            for leader, here in kept.items()
        ]
        alone.run(block)
        X = {leader: torch.cat(here).double() for leader, here in kept.items()}
        for group in groups:
            kept[group.names[0]].clear()
            for call in quantized.calls():
                block.run(call)
            moved, original = torch.cat(kept[group.names[0]]).double(), X[group.names[0]]
            cross = seen[group.names[0]].cross_moment()
            assert cross is not None
            expected = (original - moved).T @ moved / len(moved)
            bound = 1e-5 * float(moved.square().mean())
            torch.testing.assert_close(cross.double(), expected, rtol=1e-4, atol=bound)
            halve(block, group)
        for hook in hooks:
            hook.remove()
        quantized.past(block)
        alone.advance()
    for ours, theirs in (
        (float_states(streams), states_of(alone)),
        (states_of(streams.quantized), states_of(quantized)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("validation", [0, 1, 2])
def test_both_streams_agree_bitwise_in_both_ways(checkpoint: Checkpoints, validation: int) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    (kept, one), (again, other) = (
        run_both(skeleton, memory, validation=validation) for memory in (REMEMBERED, REPEATED)
    )
    assert list(kept) == list(again)
    for leader, stats in kept.items():
        judges = (stats.validation, again[leader].validation)
        assert all(isinstance(judge, InputStats) is bool(validation) for judge in judges)
        for ours, theirs in ((stats, again[leader]), judges)[: 1 + bool(validation)]:
            assert ours is not None and theirs is not None
            for moment in ("second_moment", "cross_moment", *(("drift_moment",) if ours is judges[0] else ())):
                assert torch.equal(getattr(ours, moment)(), getattr(theirs, moment)())
    for ours, theirs in (
        (float_states(one), float_states(other)),
        (states_of(one.quantized), states_of(other.quantized)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert one.notes == [] and other.notes == [REPEATED_NOTE.format(blocks=2)]


def test_states_in_files_give_the_same_bits(checkpoint: Checkpoints, tmp_path: Path) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    files = Storage(HOST, Place.FILE, tmp_path / "states")
    (kept, one), (again, other) = (run_both(skeleton, REMEMBERED, storage=storage) for storage in (None, files))
    assert all(torch.equal(kept[leader].second_moment(), again[leader].second_moment()) for leader in kept)
    for ours, theirs in (
        (float_states(one), float_states(other)),
        (states_of(one.quantized), states_of(other.quantized)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert sorted(file.name for file in (tmp_path / "states").iterdir()) == ["float-0", "quantized-0"]


@pytest.mark.parametrize("validation", [1, 2, 3])
def test_nothing_is_fitted_on_validation_sequences(checkpoint: Checkpoints, validation: int) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    streams = streams_over(skeleton, tokens(5, 24), validation=validation)
    block = skeleton.blocks[0]
    first, *_ = run_block(streams, block, lambda *_: None).values()
    judge = first.validation
    assert judge is not None and judge.cross_moment() is None
    block.load()
    stream = stream_over(skeleton, tokens(5, 24), validation=validation)
    groups = input_groups.input_groups(block, stream.sample(24))
    unit = stream.text.unit * 24
    fitted, validated = tokens(5, 24).split([5 - validation, validation])
    for stats, sequences in ((first, fitted), (judge, validated)):
        alone = input_groups.statistics(block, groups, stream_over(skeleton, sequences).calls(), unit)[groups[0]]
        assert stats.tokens == sequences.numel() and torch.equal(stats.second_moment(), alone.second_moment())
    again = input_groups.statistics(block, groups, stream.fitted_calls(), unit)[groups[0]]
    assert torch.equal(again.second_moment(), first.second_moment())


def test_both_streams_pass_a_restored_block(checkpoint: Checkpoints) -> None:
    """A block that an earlier run committed leaves the same states as one that is quantized now."""
    skeleton = skeleton_of(checkpoint("llama"))
    _, quantized_now = run_both(skeleton, REMEMBERED)
    restored = streams_over(skeleton, tokens(5, 24), floats=True)
    for block in skeleton.blocks[:2]:
        block.load()
        restored.enter(block)
        spoil(block, tuple(block.linears))  # as if it was read back
        restored.past(block)
    for ours, theirs in (
        (states_of(quantized_now.quantized), states_of(restored.quantized)),
        (float_states(quantized_now), float_states(restored)),
    ):
        assert ours and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_rewritten_block_does_not_change_the_float_states(checkpoint: Checkpoints) -> None:
    """The float stream goes on with what the block put out before it was rewritten, and compares with the new one."""
    skeleton = skeleton_of(checkpoint("llama"))
    block = skeleton.blocks[0]
    _, plain = run_first_with_floats(skeleton, lambda: None)
    seen, rewritten = run_first_with_floats(skeleton, lambda: spoil(block, tuple(block.linears)))
    assert all(torch.equal(a, b) for a, b in zip(float_states(plain), float_states(rewritten), strict=True))
    for stats in seen.values():  # nothing was quantized, so the rewritten block feeds both streams the same
        cross = stats.cross_moment()
        assert cross is not None and not cross.any()


def run_first_with_floats(skeleton: Skeleton, rewrite: Callable[[], None]) -> tuple[dict[str, InputStats], Streams]:
    block, streams = skeleton.blocks[0], streams_over(skeleton, tokens(5, 24), floats=True)
    block.load()
    streams.enter(block)
    groups = input_groups.input_groups(block, streams.quantized.sample(24))
    rewrite()
    streams.transformed(block)
    seen: dict[str, InputStats] = {}
    with Sequential(block, groups, streams) as forwards:
        forwards.run(lambda groups: seen.update({group.names[0]: stats for group, stats in groups}))
        assert streams.floats is not None and streams.floats.has_outputs
        forwards.finish(streams.floats)
        forwards.finish(streams.quantized)
    streams.advance()
    return seen, streams


def test_originals_are_exchanged_and_freed_with_the_block(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    block = skeleton.blocks[0]
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


# ---- blocks that do unusual things


class Branching(nn.Module):
    """Sequences whose first value is negative go around the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        around = bool(hidden[0, 0, 0] < 0)
        hidden = self.first(hidden)
        if not around:
            hidden = self.second(input=hidden + 1)  # by name, for once
        output: Tensor = self.last(hidden * 2)
        return output


class Routing(nn.Module):
    """The second layer sees those tokens whose first channel is positive, as an expert does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        hidden[hidden[..., 0] > 0] += self.second(hidden[hidden[..., 0] > 0])
        return hidden


class Mixed(nn.Module):
    """The second layer runs in bfloat16, the last does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.second(hidden)
        output: Tensor = self.last(hidden.float())
        return output


def one_block(block: type[nn.Module]) -> Skeleton:
    """A model of one block; sequences that begin with one of the tokens 0 to 7 go around its second layer."""
    torch.manual_seed(0)
    model = Stack(block())
    signs = torch.tensor([-1.0] * 8 + [1.0] * 8)
    model.embed.weight.data[:, 0] = model.embed.weight[:, 0].abs() * signs
    return skeleton_in_memory(model)


def around(*sequences: bool) -> Tensor:
    """(S, 6) tokens of sequences that go around the second layer, or through it."""
    ids = torch.randint(0, 16, (len(sequences), 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = torch.tensor([0 if goes_around else 8 for goes_around in sequences])
    return ids


def branching_streams(*sequences: bool, memory: int, floats: bool = False) -> tuple[Skeleton, Streams]:
    skeleton = one_block(Branching)
    return skeleton, streams_over(skeleton, around(*sequences), batch=1, memory=memory, floats=floats)


@WAYS
def test_batches_may_take_different_branches(memory: int) -> None:
    skeleton, streams = branching_streams(False, True, False, memory=memory)
    block = skeleton.blocks[0]
    stats = run_block(streams, block)
    assert [inputs.tokens for inputs in stats.values()] == [18, 12, 18]
    expected = stream_over(skeleton, around(False, True, False), batch=1)
    for output, call in zip(states_of(streams.quantized), expected.calls(), strict=True):
        assert torch.equal(output, block.run(call)), "what a batch puts out is of the weights at the end"


@WAYS
def test_a_layer_that_no_batch_reaches_has_no_tokens(memory: int) -> None:
    skeleton = one_block(Branching)
    block, streams = skeleton.blocks[0], streams_over(skeleton, around(True, True), batch=1, memory=memory)
    block.load()
    probe = stream_over(skeleton, around(False), batch=1).sample(6)
    groups = input_groups.input_groups(block, probe)
    counts = []
    with Sequential(block, groups, streams) as forwards:
        forwards.run(lambda groups: counts.extend(stats.tokens for _, stats in groups))
    assert counts == [12, 0, 12]


@WAYS
def test_tokens_are_not_paired_where_routing_may_differ(memory: int) -> None:
    skeleton = one_block(Routing)
    streams = streams_over(skeleton, around(False, True, True), batch=1, memory=memory, floats=True)
    stats = list(run_block(streams, skeleton.blocks[0], lambda *_: None).values())
    # Nothing is quantized, so the same tokens arrive; but of a part of the tokens nobody can know that.
    assert [inputs.cross_moment() is None for inputs in stats] == [False, True]
    assert 0 < stats[1].tokens < 18


@WAYS
def test_an_interrupted_pass_leaves_the_block_unchanged(memory: int) -> None:
    skeleton, streams = branching_streams(False, False, memory=memory)
    block = skeleton.blocks[0]

    def interrupt(*_: object) -> None:
        raise KeyError("anything")

    with pytest.raises(KeyError):
        run_block(streams, block, interrupt)
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert not any("forward" in vars(module) for module in block.module.modules())
    assert block.run(streams.quantized.sample(6)).shape == (1, 6, 8)


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@WAYS
@pytest.mark.parametrize("interrupted", [False, True])
def test_interrupted_forwards_restore_torch_modes(memory: int, interrupted: bool) -> None:
    """Every forward is in no_grad, and these stop inside an autocast; both belong to the thread."""
    skeleton = one_block(Mixed)
    streams = streams_over(skeleton, around(True, False, True), batch=1, memory=memory)
    block = skeleton.blocks[0]

    def check(*_: object) -> None:
        assert modes() == (True, False)
        if interrupted:
            raise KeyError("anything")

    if interrupted:
        with pytest.raises(KeyError):
            run_block(streams, block, check)
    else:
        run_block(streams, block, check)
        expected = stream_over(skeleton, around(True, False, True), batch=1)
        for output, call in zip(states_of(streams.quantized), expected.calls(), strict=True):
            assert torch.equal(output, block.run(call))
    assert modes() == (True, False)


@WAYS
def test_an_error_in_the_block_reaches_the_caller(memory: int) -> None:
    skeleton, streams = branching_streams(False, memory=memory)
    block = skeleton.blocks[0]
    block.load()
    groups = input_groups.input_groups(block, streams.quantized.sample(6))
    block.module.second = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be"), Sequential(block, groups, streams) as forwards:
        forwards.run(lambda *_: None)


# ---- memory


class Eager(nn.Module):
    """Puts out what is kept by two layers and what is not: sums that the block's own code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.last(hidden + self.second(self.first(hidden) * 2))
        return output


def test_outputs_of_finished_modules_count_as_kept() -> None:
    skeleton = one_block(Eager)
    block = skeleton.blocks[0]
    block.load()
    T = 50
    call = Call((torch.randn(1, T, 8),), {})
    stops = stops_of(block, input_groups.input_groups(block, call))
    assert [kept_bytes(block, stops[:number], call) for number in range(4)] == [0, 0, 4 * T * 16, 4 * T * (16 + 8)]


def test_forwards_are_remembered_only_if_they_fit(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    block, ids = skeleton.blocks[0], tokens(5, 24)
    block.load()
    sample = stream_over(skeleton, ids).sample(24)
    groups = input_groups.input_groups(block, sample)
    text = 5 * kept_bytes(block, stops_of(block, groups), sample)

    def least(**settings: Any) -> int:
        """The least memory in which forwards are remembered."""
        low, high = 0, 1 << 24
        while low < high:
            streams = streams_over(skeleton, ids, memory=(low + high) // 2, **settings)
            answer = Sequential(block, groups, streams).remembers
            assert streams.repeated == (not answer)
            low, high = (low, streams.memory) if answer else (streams.memory + 1, high)
        return low

    alone, both, judged = least(), least(floats=True), least(validation=1)
    assert alone >= text + 3 * block.float_bytes, "a block and its copies come first"
    assert both >= alone + text + block.float_bytes, "so do the float block and the float stream"
    assert judged > alone, "and the sums over validation sequences"
