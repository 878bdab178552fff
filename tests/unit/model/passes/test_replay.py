"""A forward that is continued gives the bits of one plain forward, and runs each layer's product once."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.checkpoint.reader import Checkpoint
from llmq.model.analyse.input_groups import input_groups
from llmq.model.build.block import Block, Call
from llmq.model.experts.separate import Routed
from llmq.model.passes.replay import Replay, in_front_of, tensors_in
from llmq.model.passes.statistics import stops_of
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders, mixtures
from tests.builders import skeleton_in_memory, skeleton_of, tokens
from tests.passes import Stack

Checkpoints = Callable[..., Path]


class ThreeLayers(nn.Module):
    """What the blocks below have in common: three linear layers, called in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))


class Plain(ThreeLayers):
    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.third(self.second(self.first(hidden).tanh()) + hidden)
        return output


class ChangesOutputs(ThreeLayers):
    """What a layer put out is changed in place later, in front of another layer and behind it."""

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.first(hidden)
        first.mul_(2)
        second = self.second(first)
        first += second
        output: Tensor = self.third(first)
        second.zero_()
        return output + second


class ChangesViews(ThreeLayers):
    """The same through a view."""

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.first(hidden)
        half = first[..., :4]
        output: Tensor = first + self.second(first)
        half.add_(1)
        return self.third(output) + first


class Adds(nn.Module):
    """Changes its input in place, and puts nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, other: Tensor) -> None:
        hidden += self.inner(other)


class ChangesInputs(ThreeLayers):
    """A module changes what it is given, and puts nothing out: running it is all that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = Adds()

    def forward(self, hidden: Tensor) -> Tensor:
        stream = hidden.clone()
        self.adds(stream, other=self.first(stream))
        self.adds(stream, other=self.second(stream))
        output: Tensor = self.third(stream)
        return output


class CallsTwice(ThreeLayers):
    """One layer is called twice, a norm three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.first(self.norm(hidden))
        second = self.second(self.norm(self.first(first)))
        output: Tensor = self.third(self.norm(second + first))
        return output


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        return self.one(hidden), {"other": self.other(hidden), "nothing": None}


class ReturnsTuples(ThreeLayers):
    """A module puts out a tuple, the block a list."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, hidden: Tensor) -> list[Tensor | None]:
        one, rest = self.pair(self.first(hidden))
        other = rest["other"]
        assert other is not None
        other *= self.second(one)
        return [self.third(other + one), None]


class PassesThrough(ThreeLayers):
    """A module returns its very input, which is changed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.dropout(self.first(hidden))
        first += self.dropout(self.second(first))
        output: Tensor = self.third(first)
        return output


class Mixed(ThreeLayers):
    """The second layer runs in bfloat16."""

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.first(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = self.second(first)
        output: Tensor = self.third(second.float())
        return output


class Swaps(ThreeLayers):
    """The first two layers run in the other order for some batches."""

    def forward(self, hidden: Tensor) -> Tensor:
        layers = [self.first, self.second] if hidden[..., 0].sum() > 0 else [self.second, self.first]
        for layer in layers:
            hidden = torch.tanh(layer(hidden))
        output: Tensor = self.third(hidden)
        return output


class Branches(ThreeLayers):
    """A value that the first layer puts out decides about the second."""

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.first(hidden)
        if bool(first[0, 0, 0] > 0):
            first = first + self.second(first)
        output: Tensor = self.third(first)
        return output


BLOCKS = [
    Plain, ChangesOutputs, ChangesViews, ChangesInputs, CallsTwice, ReturnsTuples, PassesThrough, Mixed, Branches, Swaps
]  # fmt: skip


def loaded(module: nn.Module) -> Block:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    block = skeleton_in_memory(Stack(module)).blocks[0]
    block.load()
    return block


def batches(count: int = 4) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [Call((torch.randn(2, 5, 8, generator=generator),), {}) for _ in range(count)]


@contextmanager
def products(block: Block) -> Iterator[Counter[str]]:
    """How often each linear layer's own forward runs while open; on the class, which a replay goes through."""
    counts: Counter[str] = Counter()
    paths = {id(linear): path.rpartition(".")[2] for path, linear in block.linears.items()}
    forwards = {type(linear): type(linear).forward for linear in block.linears.values()}

    def counted(linear: nn.Linear, input: Tensor) -> Tensor:
        counts[paths[id(linear)]] += 1
        return forwards[type(linear)](linear, input)

    for kind in forwards:
        kind.forward = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        for kind, forward in forwards.items():
            kind.forward = forward  # type: ignore[method-assign]


def in_order(block: Block) -> list[nn.Linear]:
    """The linear layers as they first run, on a batch in which all of them do."""
    groups = max((input_groups(block, call) for call in batches()), key=len)
    return [block.linears[name] for group in groups for name in group.names]


def walk(block: Block, calls: list[Call], *, remember: bool) -> tuple[list[list[Tensor | None]], list[Tensor]]:
    """Every batch to every layer, which is changed when all are there; then to the end.

    Returns what arrived at each layer of each batch, and what the block put out.
    """
    arrived: list[list[Tensor | None]] = []
    layers = in_order(block)
    with Replay(block, remember=remember, unquantized=layers) as replay:
        for linear in layers:
            row = [replay.run_to(number, call, linear) for number, call in enumerate(calls)]
            arrived.append([None if inputs is None else inputs.clone() for inputs in row])
            linear.weight.data.mul_(0.5)
            replay.settle([linear])
        outputs = [replay.finish(number, call) for number, call in enumerate(calls)]
        assert not replay._finished
    return arrived, outputs


def plain_walk(block: Block, calls: list[Call]) -> tuple[list[list[Tensor | None]], list[Tensor]]:
    """The same by whole forwards."""
    arrived: list[list[Tensor | None]] = []
    for linear in in_order(block):
        row: list[Tensor | None] = []
        for call in calls:
            inputs: list[Tensor] = []
            hook = linear.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].clone()))
            block.run(call)
            hook.remove()
            row.append(inputs[0] if inputs else None)
        arrived.append(row)
        linear.weight.data.mul_(0.5)
    return arrived, [block.run(call) for call in calls]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_continued_forwards_equal_plain_ones(kind: type[nn.Module], remember: bool) -> None:
    arrived, outputs = walk(loaded(kind()), batches(), remember=remember)
    expected, expected_outputs = plain_walk(loaded(kind()), batches())
    for row, expected_row in zip(arrived, expected, strict=True):
        assert all(same(one, other) for one, other in zip(row, expected_row, strict=True))
    assert all(same(one, other) for one, other in zip(outputs, expected_outputs, strict=True))
    if kind is Branches:
        assert {inputs is None for inputs in arrived[1]} == {True, False}, "some come to the second layer, some do not"


@pytest.mark.parametrize("kind", [Plain, Mixed, CallsTwice], ids=lambda kind: kind.__name__)
def test_each_product_runs_once_for_each_batch(kind: type[nn.Module]) -> None:
    """But for a layer that the block itself calls twice."""
    block = loaded(kind())
    twice = {"first"} if kind is CallsTwice else set()
    with products(block) as counts:
        walk(block, batches(), remember=True)
    probes = 4  # of `in_order`
    assert counts == {name: (4 + probes) * (1 + (name in twice)) for name in ("first", "second", "third")}
    with products(block) as repeated:
        walk(block, batches(), remember=False)
    assert repeated["first"] > counts["first"] and repeated["third"] == counts["third"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm", "neox", "phi3", "falcon"])
def test_products_of_real_blocks_run_once(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    block = skeleton.blocks[1]
    block.load()
    calls = [skeleton.record(1, tokens(2, 24, seed=seed)) for seed in range(2)]
    stops = stops_of(block, input_groups(block, calls[0]))
    with products(block) as counts, Replay(block, remember=True) as replay:
        for stop in stops:
            for number, call in enumerate(calls):
                assert replay.run_to(number, call, stop.module) is not None
        outputs = [replay.finish(number, call) for number, call in enumerate(calls)]
    assert counts == {path.rpartition(".")[2]: 2 for path in block.linears}
    assert all(torch.equal(output, block.run(call)) for output, call in zip(outputs, calls, strict=True))


def test_experts_are_continued_at_both_stations(tmp_path: Path) -> None:
    """What arrives is how tokens are routed; between the stations the experts' products run once."""
    folder = builders.save_model(tmp_path, builders.causal_model(mixtures.CONFIGS["mixtral"]()))
    skeleton = open_skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    block, call = skeleton.blocks[0], skeleton.record(0, tokens(2, 24))
    block.load()
    [experts] = block.experts.values()
    with products(block) as counts, Replay(block, remember=True) as replay:
        for station in (experts.before_up, experts.before_down):
            arrival = replay.run_to(0, call, station)
            assert isinstance(arrival, Routed) and list(tensors_in(arrival))
        assert replay.nbytes(0) > 0
        output = replay.finish(0, call)
        assert replay.nbytes(0) == 0
    assert max(counts.values()) <= mixtures.EXPERTS
    assert torch.equal(output, block.run(call))


# ---- what the block is like afterwards


def forwards_of(block: Block) -> dict[str, object]:
    return {name: vars(module).get("forward") for name, module in block.module.named_modules()}


@pytest.mark.parametrize("remember", [True, False])
def test_forwards_are_restored_afterwards(remember: bool) -> None:
    block = loaded(ReturnsTuples())
    before, call = forwards_of(block), batches(1)[0]
    with Replay(block, remember=remember) as replay:
        assert (forwards_of(block) != before) is remember
        replay.run_to(0, call, block.module.second)
    assert forwards_of(block) == before and not replay._finished
    assert not any(module._forward_pre_hooks for module in block.module.modules())


@pytest.mark.parametrize("remember", [True, False])
def test_forwards_are_restored_after_an_error(remember: bool) -> None:
    block = loaded(Plain())
    before, call = forwards_of(block), Call((torch.randn(2, 5, 8),), {})
    block.module.second = nn.Linear(5, 8)
    before = forwards_of(block)
    with pytest.raises(RuntimeError, match="shapes cannot be"), Replay(block, remember=remember) as replay:
        replay.run_to(0, call, block.module.third)
    assert forwards_of(block) == before
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    block.module.second = nn.Linear(8, 8)
    assert block.run(call).shape == (2, 5, 8)


def test_a_module_with_its_own_forward_is_not_changed() -> None:
    """Such as one that accelerate wrapped."""
    block = loaded(ReturnsTuples())
    pair = block.module.pair
    calls: list[int] = []

    def own(hidden: Tensor) -> object:
        calls.append(1)
        return type(pair).forward(pair, hidden)

    pair.forward = own
    expected = [block.run(call) for call in batches()]
    calls.clear()
    with Replay(block, remember=True) as replay:
        assert vars(pair)["forward"] is own
        for linear in in_order(block):
            for number, call in enumerate(batches()):
                replay.run_to(number, call, linear)
        outputs = [replay.finish(number, call) for number, call in enumerate(batches())]
    assert vars(pair)["forward"] is own and len(calls) > 4, "it runs again each time"
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_module_used_alone_is_not_remembered() -> None:
    """A stage may run a layer by itself between two forwards of the block."""
    block, call = loaded(Plain()), batches(1)[0]
    with Replay(block, remember=True) as replay:
        replay.run_to(0, call, block.module.third)
        kept = replay.nbytes(0)
        alone = [block.module.first(torch.full((1, 8), value)) for value in (0.0, 1.0)]
        assert not torch.equal(*alone) and replay.nbytes(0) == kept
        output = replay.finish(0, call)
    assert torch.equal(output, block.run(call))


def test_remembered_bytes_count_each_storage_once() -> None:
    block, call = loaded(PassesThrough()), batches(1)[0]
    with Replay(block, remember=True) as replay:
        assert replay.nbytes(0) == 0
        replay.run_to(0, call, block.module.second)
        assert replay.nbytes(0) == 2 * 5 * 8 * 4, "of the first layer, and of the module that returns the same"


def test_keyword_inputs_are_recognized() -> None:
    linear, seen = nn.Linear(8, 8), []
    with in_front_of(linear, seen.append):
        linear(torch.zeros(1, 8))
        linear(input=torch.ones(1, 8))
    linear(torch.ones(1, 8))
    assert [float(inputs.sum()) for inputs in seen] == [0, 8]
