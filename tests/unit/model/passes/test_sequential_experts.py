"""Statistics of experts: remembered and repeated forwards agree; own and borrowed tokens against sums in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.model.analyse import input_groups
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import Routed, SeparateExperts
from llmq.model.passes.statistics import stops_of
from llmq.model.passes.streams import Stream
from llmq.numerics.input_stats import InputStats
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders, mixtures
from tests.passes import REMEMBERED, REPEATED, halve, run_block, states_of, stream_over, streams_over

ALL, OWN = 1e6, 0.0  # tokens that an expert takes for each of its inputs
TEXT = builders.tokens(5, 24)

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


def run_first(
    skeleton: Skeleton,
    memory: int,
    tokens_per_input: float,
    *,
    floats: bool = False,
    validation: int = 0,
    at_once: int | None = None,
) -> tuple[dict[str, InputStats], list[Tensor]]:
    """(leader -> statistics, outputs of each batch) of the first block."""
    streams = streams_over(
        skeleton, TEXT, memory=memory, floats=floats, validation=validation, tokens_per_input=tokens_per_input
    )
    return run_block(streams, skeleton.blocks[0], at_once=at_once), states_of(streams.quantized)


def loaded(skeleton: Skeleton) -> tuple[Block, Stream]:
    """The first block with its float weights, and text in front of it."""
    skeleton.blocks[0].load()
    return skeleton.blocks[0], stream_over(skeleton, TEXT)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_remembered_and_repeated_forwards_agree_bitwise(opened: Open, name: str, at_once: int) -> None:
    (kept, outputs), (again, other_outputs) = (
        run_first(opened(name), memory, 2.0, floats=True, validation=1, at_once=at_once)
        for memory in (REMEMBERED, REPEATED)
    )
    assert list(kept) == list(again)
    assert all(torch.equal(a, b) for a, b in zip(outputs, other_outputs, strict=True))
    for leader, stats in kept.items():
        other = again[leader]
        assert (stats.tokens, stats.borrowed) == (other.tokens, other.borrowed)
        assert stats.validation is not None and other.validation is not None
        for ours, theirs in ((stats, other), (stats.validation, other.validation)):
            cross, other_cross = ours.cross_moment(), theirs.cross_moment()
            assert cross is not None and other_cross is not None and torch.equal(cross, other_cross)
            assert torch.equal(ours.second_moment(), theirs.second_moment())
        assert stats.validation.drift_moment() is not None


def arrivals_at(block: Block, stream: Stream) -> list[tuple[Routed, Routed]]:
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
def test_experts_get_their_own_and_borrowed_tokens(opened: Open, name: str, wanted: float) -> None:
    skeleton = opened(name)
    stats_of, _ = run_first(skeleton, REMEMBERED, wanted)
    block, stream = loaded(skeleton)
    [(path, experts)] = block.experts.items()
    for group in input_groups.input_groups(block, stream.sample(24)):
        if group.names[0].startswith(f"{path}."):
            e = int(group.names[0].removeprefix(f"{path}.").split(".")[0])
            seen, stats = arrivals_at(block, stream), stats_of[group.names[0]]
            X = expected(experts, e, int("down_proj" in group.names[0]), seen, wanted).double()
            own = sum(len(up.rows[e]) for up, _ in seen)
            assert stats.tokens == len(X) and stats.borrowed == len(X) - own
            torch.testing.assert_close(stats.second_moment().double(), X.T @ X / max(1, len(X)), rtol=1e-5, atol=1e-6)
        halve(block, group)


def by_token(routed: Routed, e: int) -> dict[int, Tensor]:
    """Row of `hidden` -> what expert e is fed for it."""
    return dict(zip(routed.rows[e].tolist(), routed.inputs(e).double(), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_the_float_stream_is_paired_token_by_token(opened: Open, name: str) -> None:
    """A second projection knows the float model's input where the token went to the same expert there."""
    skeleton = opened(name)
    stats_of, _ = run_first(skeleton, REMEMBERED, OWN, floats=True)
    block, stream = loaded(skeleton)
    [(path, experts)] = block.experts.items()
    groups = input_groups.input_groups(block, stream.sample(24))
    unrouted, moved = arrivals_at(block, stream), 0
    for group in groups:
        if group.names[0].startswith(f"{path}."):
            e, side = int(group.names[0].removeprefix(f"{path}.").split(".")[0]), int("down_proj" in group.names[0])
            seen, products = arrivals_at(block, stream), torch.zeros(group.in_features, group.in_features).double()
            for ours, theirs in zip(seen, unrouted, strict=True):
                original = by_token(theirs[side], e)
                if experts.form.routed and not side:
                    original = dict(enumerate(theirs[side].hidden.double()))
                for row, x in by_token(ours[side], e).items():
                    products += torch.outer(original.get(row, x) - x, x)
            stats = stats_of[group.names[0]]
            cross = stats.cross_moment()
            assert cross is not None
            torch.testing.assert_close(cross.double(), products / stats.tokens, rtol=1e-3, atol=1e-5)
            moved += int(bool(products.any()))
        halve(block, group)
    assert moved == 2 * mixtures.EXPERTS


def test_experts_borrow_no_more_than_they_lack(opened: Open) -> None:
    stats_of, _ = run_first(opened("mixtral"), REMEMBERED, 2.0)
    several = [(stats, leader) for leader, stats in stats_of.items() if ".experts." in leader]
    assert {stats.borrowed > 0 for stats, _ in several} == {True, False}
    for stats, leader in several:
        wanted = 2 * (48 if "down_proj" in leader or "w2" in leader else 32)
        own = stats.tokens - stats.borrowed
        lacking = max(0, wanted - own)
        assert lacking <= stats.borrowed < lacking + 3 or stats.tokens == 5 * 24  # of three batches, each rounds up


def test_validation_statistics_borrow_in_proportion(opened: Open) -> None:
    """To their part of the text: one sequence of five."""
    stats_of, _ = run_first(opened("mixtral"), REMEMBERED, 3.0, validation=1)
    for leader, stats in stats_of.items():
        if ".experts." in leader:
            assert stats.validation is not None
            own, wanted = stats.validation.tokens - stats.validation.borrowed, 3 * stats.mean_square.numel() / 4
            assert stats.validation.tokens >= min(24, max(own, wanted))
            assert stats.validation.borrowed <= max(0, math.ceil(wanted - own))


def test_borrowed_tokens_change_no_output(opened: Open) -> None:
    _, plain = run_first(opened("mixtral"), REMEMBERED, OWN)
    _, with_others = run_first(opened("mixtral"), REMEMBERED, ALL)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_others, strict=True))


def test_both_streams_agree_in_front_of_float_weights(opened: Open) -> None:
    """With nothing quantized both streams feed all projections the same, whatever experts tokens go to."""
    skeleton = opened("mixtral")
    streams = streams_over(skeleton, TEXT, floats=True, tokens_per_input=4.0)
    for stats in run_block(streams, skeleton.blocks[0], lambda *_: None).values():
        cross = stats.cross_moment()
        assert cross is not None and not cross.any()


def test_each_projection_of_all_experts_has_one_stop(opened: Open) -> None:
    block, stream = loaded(opened("qwen2_moe"))
    groups = input_groups.input_groups(block, stream.sample(1))  # some experts see no token, and run all the same
    stops = stops_of(block, groups)
    together = [stop for stop in stops if stop.experts is not None]
    assert [len(stop.groups) for stop in together] == [mixtures.EXPERTS] * 2
    assert [stop.numbers for stop in together] == [tuple(range(mixtures.EXPERTS))] * 2
    assert all(len(group.names) == 2 for group in together[0].groups)
    assert sum(len(stop.groups) for stop in stops) == len(groups)
    assert math.isfinite(float(block.run(stream.sample(1)).sum()))
