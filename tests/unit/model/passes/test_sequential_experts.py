"""Statistics of experts: held and repeated forwards alike, own tokens and borrowed ones against sums in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.model.analyse import input_groups
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import Routed, SeparateExperts
from llmq.model.passes.hidden_states import Stream
from llmq.model.passes.statistics import stops_of
from llmq.numerics.input_stats import InputStats
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders, mixtures

HELD, REPEATED = 1 << 40, 0  # bytes that may be held
ALL, OWN = 1e6, 0.0  # tokens that an expert takes for each of its inputs

Open = Callable[[str], Skeleton]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """A skeleton of a tiny mixture, its layers with experts first."""
    made: dict[str, Path] = {}

    def make(name: str) -> Skeleton:
        if name not in made:
            model = builders.causal_model(mixtures.CONFIGS[name]())
            made[name] = builders.save_model(tmp_path_factory.mktemp(name), model)
        return open_skeleton(Checkpoint.open(made[name]), torch.device("cpu"), torch.float32)

    return make


def spoil(block: Block, group: InputGroup) -> None:
    """Stands for rounding."""
    for path in group.names:
        block.set_weight(path, block.weight(path) * 0.5)


def walk(
    skeleton: Skeleton, memory: int, tokens_per_input: float, *, both: bool = False, held_out: int = 0, at_once: int = 0
) -> tuple[dict[str, InputStats], list[Tensor]]:
    """(leader -> statistics, outputs of each batch) of the first block, each group spoiled when its turn is over."""
    block = skeleton.blocks[0]
    block.load()
    stream = Stream(
        skeleton,
        builders.tokens(5, 24),
        batch=2,
        memory=memory,
        originals=both,
        held_out=held_out,
        tokens_per_input=tokens_per_input,
    )
    stream.enter(block)
    flow = stream.flow(block, input_groups.input_groups(block, stream.sample(24)))
    flow._at_once = at_once or flow._at_once
    found = {}
    for group, stats in flow.statistics():
        found[group.names[0]] = stats
        spoil(block, group)
    stream.advance(block, flow.outputs, flow.original_outputs)
    return found, [call.hidden for call in stream.calls()]


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_held_and_repeated_give_the_same_bits(opened: Open, name: str, at_once: int) -> None:
    settings = {"both": True, "held_out": 1, "at_once": at_once}
    held, outputs = walk(opened(name), HELD, 2.0, **settings)  # type: ignore[arg-type]
    repeated, others = walk(opened(name), REPEATED, 2.0, **settings)  # type: ignore[arg-type]
    assert list(held) == list(repeated)
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
    for leader, stats in held.items():
        other = repeated[leader]
        assert (stats.tokens, stats.borrowed) == (other.tokens, other.borrowed)
        assert stats.cross_moment() is not None and other.cross_moment() is not None
        assert torch.equal(stats.second_moment(), other.second_moment()) and torch.equal(
            stats.cross_moment(), other.cross_moment()
        )
        assert stats.held_out is not None and other.held_out is not None
        assert torch.equal(stats.held_out.second_moment(), other.held_out.second_moment())
        assert stats.held_out.drift_moment() is not None


def seen_of(block: Block, stream: Stream) -> list[tuple[Routed, Routed]]:
    """What comes to the two stations of the block's experts, batch by batch."""
    [experts] = block.experts.values()
    seen: list[Routed] = []
    stations = (experts.before_up, experts.before_down)
    handles = [station.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for station in stations]
    for call in stream.calls():
        block.run(call)
    for handle in handles:
        handle.remove()
    return list(zip(seen[::2], seen[1::2], strict=True))


def expected(experts: SeparateExperts, e: int, side: int, seen: list[tuple[Routed, Routed]], wanted: float) -> Tensor:
    """(T, K) what expert e's projection is fed: its own tokens, or all of the layer."""
    if wanted == OWN:
        return torch.cat([routed[side].inputs(e) for routed in seen])
    with torch.no_grad():
        hidden = torch.cat([up.hidden[up.all_rows] for up, _ in seen])
        return experts.inner(e, hidden) if side else hidden


@pytest.mark.parametrize("wanted", [OWN, ALL])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_statistics_are_of_own_tokens_and_of_others_where_asked(opened: Open, name: str, wanted: float) -> None:
    skeleton = opened(name)
    found, _ = walk(skeleton, HELD, wanted)
    block = skeleton.blocks[0]
    block.load()  # the float weights again
    stream = Stream(skeleton, builders.tokens(5, 24), batch=2)
    [(path, experts)] = block.experts.items()
    for group in input_groups.input_groups(block, stream.sample(24)):
        if group.names[0].startswith(f"{path}."):
            e = int(group.names[0].removeprefix(f"{path}.").split(".")[0])
            seen, stats = seen_of(block, stream), found[group.names[0]]
            X = expected(experts, e, int("down_proj" in group.names[0]), seen, wanted).double()
            own = sum(len(up.rows[e]) for up, _ in seen)
            assert stats.tokens == len(X) and stats.borrowed == len(X) - own
            torch.testing.assert_close(stats.second_moment().double(), X.T @ X / max(1, len(X)), rtol=1e-5, atol=1e-6)
        spoil(block, group)


def by_token(routed: Routed, e: int) -> dict[int, Tensor]:
    """Row of `hidden` -> what expert e is fed for it."""
    return dict(zip(routed.rows[e].tolist(), routed.inputs(e).double(), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_the_float_stream_is_paired_token_by_token(opened: Open, name: str) -> None:
    """A second projection knows the float model's input where the token went to the same expert there."""
    skeleton = opened(name)
    found, _ = walk(skeleton, HELD, OWN, both=True)
    block = skeleton.blocks[0]
    block.load()
    stream = Stream(skeleton, builders.tokens(5, 24), batch=2)
    [(path, experts)] = block.experts.items()
    groups = input_groups.input_groups(block, stream.sample(24))
    unrouted, moved = seen_of(block, stream), 0
    for group in groups:
        if group.names[0].startswith(f"{path}."):
            e, side = int(group.names[0].removeprefix(f"{path}.").split(".")[0]), int("down_proj" in group.names[0])
            seen, cross = seen_of(block, stream), torch.zeros(group.in_features, group.in_features).double()
            for ours, theirs in zip(seen, unrouted, strict=True):
                original = by_token(theirs[side], e)
                if experts.form.routed and not side:
                    original = dict(enumerate(theirs[side].hidden.double()))
                for row, x in by_token(ours[side], e).items():
                    cross += torch.outer(original.get(row, x) - x, x)
            stats = found[group.names[0]]
            assert stats.cross_moment() is not None
            torch.testing.assert_close(stats.cross_moment().double(), cross / stats.tokens, rtol=1e-3, atol=1e-5)
            moved += int(bool(cross.any()))
        spoil(block, group)
    assert moved == 2 * mixtures.EXPERTS


def test_no_more_is_borrowed_than_is_lacking(opened: Open) -> None:
    found, _ = walk(opened("mixtral"), HELD, 2.0)
    several = [(stats, leader) for leader, stats in found.items() if ".experts." in leader]
    assert {stats.borrowed > 0 for stats, _ in several} == {True, False}
    for stats, leader in several:
        wanted = 2 * (48 if "down_proj" in leader or "w2" in leader else 32)
        own = stats.tokens - stats.borrowed
        lacking = max(0, wanted - own)
        assert lacking <= stats.borrowed < lacking + 3 or stats.tokens == 5 * 24  # of three batches, each rounds up


def test_what_judges_borrows_as_well(opened: Open) -> None:
    """In proportion to its part of the text: one window of five."""
    found, _ = walk(opened("mixtral"), HELD, 3.0, held_out=1)
    for leader, stats in found.items():
        if ".experts." in leader:
            assert stats.held_out is not None
            own, wanted = stats.held_out.tokens - stats.held_out.borrowed, 3 * stats.mean_square.numel() / 4
            assert stats.held_out.tokens >= min(24, max(own, wanted))
            assert stats.held_out.borrowed <= max(0, math.ceil(wanted - own))


def test_the_block_puts_out_the_same_whatever_is_borrowed(opened: Open) -> None:
    _, plain = walk(opened("mixtral"), HELD, OWN)
    _, with_others = walk(opened("mixtral"), HELD, ALL)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_others, strict=True))


def test_in_front_of_anything_rounded_the_float_stream_is_the_same(opened: Open) -> None:
    """With nothing spoiled yet both streams feed the first projections the same, whatever experts tokens go to."""
    skeleton = opened("mixtral")
    block = skeleton.blocks[0]
    block.load()
    stream = Stream(skeleton, builders.tokens(5, 24), batch=2, memory=HELD, originals=True, tokens_per_input=4.0)
    stream.enter(block)
    flow = stream.flow(block, input_groups.input_groups(block, stream.sample(24)))
    for _, stats in flow.statistics():
        assert stats.cross_moment() is not None and not stats.cross_moment().any()


def test_a_stop_for_each_projection_of_all_experts(opened: Open) -> None:
    skeleton = opened("qwen2_moe")
    block = skeleton.blocks[0]
    block.load()
    stream = Stream(skeleton, builders.tokens(5, 24), batch=2)
    groups = input_groups.input_groups(
        block, stream.sample(1)
    )  # one token: some experts see none, and run all the same
    stops = stops_of(block, groups)
    together = [stop for stop in stops if stop.experts is not None]
    assert [len(stop.groups) for stop in together] == [mixtures.EXPERTS] * 2
    assert [stop.numbers for stop in together] == [tuple(range(mixtures.EXPERTS))] * 2
    assert all(len(group.names) == 2 for group in together[0].groups)
    assert sum(len(stop.groups) for stop in stops) == len(groups)
    assert math.isfinite(float(block.run(stream.sample(1)).sum()))
