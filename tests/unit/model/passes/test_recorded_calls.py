"""Recorded calls: for each block what the skeleton records for the same tokens, recorded once for each shape."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.model.build.block import Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import recorded_calls
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.replay import tensors_in
from tests.builders import CONFIGS, WINDOW, skeleton_in_memory, skeleton_of, tokens

Checkpoints = Callable[..., Path]
LENGTH = 3 * WINDOW  # longer than the window of a sliding layer


class Counted:
    """What is recorded of a skeleton: the indices of single blocks, and how often all of them."""

    def __init__(self, skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
        self.single: list[int] = []
        self.all = 0
        record, record_all = skeleton.record, skeleton.record_all

        def count_single(index: int, ids: Tensor) -> Call:
            self.single.append(index)
            return record(index, ids)

        def count_all(ids: Tensor) -> list[Call]:
            self.all += 1
            return record_all(ids)

        monkeypatch.setattr(skeleton, "record", count_single)
        monkeypatch.setattr(skeleton, "record_all", count_all)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same structure, tensors bit by bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor) and actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, tuple | list):
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    else:
        assert actual == expected or actual is expected


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_equal_those_of_the_skeleton(checkpoint: Checkpoints, name: str) -> None:
    """For other tokens of the same shape, and for other shapes."""
    skeleton = skeleton_of(checkpoint(name))
    calls = RecordedCalls(skeleton)
    for batch, length, seed in ((2, LENGTH, 0), (2, LENGTH, 1), (1, LENGTH, 2), (2, LENGTH - 5, 3)):
        ids = tokens(batch, length, seed=seed)
        first, expected = calls.first(ids), skeleton.record(0, ids)
        assert_equal((first.args, first.kwargs), (expected.args, expected.kwargs))
        hidden = torch.randn(first.hidden.shape)
        for index in range(len(skeleton.blocks)):
            call, expected = calls.call(index, ids, hidden), skeleton.record(index, ids).with_hidden(hidden)
            assert call.hidden is hidden
            assert_equal((call.args, call.kwargs), (expected.args, expected.kwargs))


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])
def test_each_shape_is_recorded_once(checkpoint: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tokens and for others, which are compared; every further batch of text is compared as well."""
    skeleton = skeleton_of(checkpoint(name))
    counted, calls = Counted(skeleton, monkeypatch), RecordedCalls(skeleton)
    hidden = calls.first(tokens(2, LENGTH)).hidden
    assert counted.all == 2
    for seed in range(5):
        for index in range(len(skeleton.blocks)):
            calls.call(index, tokens(2, LENGTH, seed=seed), hidden)
    assert (counted.all, counted.single) == (2, [])
    calls.first(tokens(2, LENGTH, seed=1))
    assert (counted.all, counted.single) == (3, []), "a batch that was not seen before is compared with its shape"
    calls.first(tokens(2, LENGTH, seed=1), seen=True)
    assert (counted.all, counted.single) == (3, [0]), "of one that was, the embedding is recorded alone"
    calls.call(1, tokens(1, LENGTH), hidden[:1])
    calls.call(2, tokens(1, LENGTH), hidden[:1])
    assert (counted.all, counted.single) == (5, [0])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor, *, scale: float, extra: Any) -> Tensor:
        output: Tensor = self.linear(hidden) * mask[..., None] * scale
        return output


class MaskedModel(nn.Module):
    """Calls its blocks with what `arguments` makes of the tokens: a mask (B, T), a scale, and anything."""

    def __init__(self, arguments: Callable[[Tensor], tuple[Tensor, float, Any]]) -> None:
        super().__init__()
        self.embed = nn.Embedding(264, 8)
        self.blocks = nn.ModuleList(Masked() for _ in range(3))
        self._arguments = arguments

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for block in self.blocks:
            mask, scale, extra = self._arguments(input_ids)
            hidden = block(hidden, mask, scale=scale, extra=extra)
        return hidden


DEPENDENT: dict[str, Callable[[Tensor], tuple[Tensor, float, Any]]] = {
    "a tensor": lambda ids: ((ids > 130).float(), 1.0, None),
    "a number": lambda ids: (torch.ones(ids.shape), float(ids.sum()), None),
    "a shape": lambda ids: (torch.ones(ids.shape), 1.0, torch.ones(int(ids[0, 0]))),
    "a dtype": lambda ids: (
        torch.ones(ids.shape),
        1.0,
        torch.ones(1).to([torch.float, torch.half][int(ids[0, 0]) % 2]),
    ),
    "a tensor in a tuple": lambda ids: (torch.ones(ids.shape), 1.0, (None, [ids])),
    "a tensor in a dictionary": lambda ids: (torch.ones(ids.shape), 1.0, {"a": {"b": ids}}),
    "a kind": lambda ids: (torch.ones(ids.shape), 1.0, "1" if int(ids[0, 0]) % 2 else 1),
    "something that cannot be compared": lambda ids: (torch.ones(ids.shape), 1.0, types.SimpleNamespace(ids=ids)),
}


@pytest.mark.parametrize("arguments", DEPENDENT.values(), ids=DEPENDENT)
def test_arguments_that_depend_on_tokens_are_recorded_again(
    arguments: Callable[[Tensor], tuple[Tensor, float, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_in_memory(MaskedModel(arguments))
    calls, hidden = RecordedCalls(skeleton), torch.ones(2, 6, 8)
    for seed in range(4):
        ids = tokens(2, 6, seed=seed)
        for index in range(3):
            call, expected = calls.call(index, ids, hidden), skeleton.record(index, ids)
            assert call.hidden is hidden and torch.equal(call.args[1], expected.args[1])
            assert call.kwargs["scale"] == expected.kwargs["scale"]
            assert str(call.kwargs["extra"]) == str(expected.kwargs["extra"])
    counted = Counted(skeleton, monkeypatch)
    calls.call(1, tokens(2, 6), hidden)
    calls.first(tokens(2, 6))
    assert (counted.all, counted.single) == (0, [1, 0]) and not calls._by_shape, "nothing is kept"


def test_a_later_batch_may_show_that_arguments_depend_on_tokens() -> None:
    """The first two texts have the same mask, the third has another."""
    skeleton = skeleton_in_memory(MaskedModel(lambda ids: ((ids < 200).float(), 1.0, None)))
    calls, hidden = RecordedCalls(skeleton), torch.ones(1, 3, 8)
    few, many = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 250]])
    assert calls.call(1, few, hidden).args[1].tolist() == [[1, 1, 1]] and calls._by_shape
    assert calls.first(many).args[1].tolist() == [[1, 1, 0]]
    assert calls.call(1, many, hidden).args[1].tolist() == [[1, 1, 0]]
    assert calls.call(1, few, hidden).args[1].tolist() == [[1, 1, 1]] and not calls._by_shape


def independent(ids: Tensor) -> tuple[Tensor, float, Any]:
    mask = torch.ones(ids.shape)
    return mask, 0.5, {"masks": [mask.clone(), (mask.clone(), None)], "name": "full"}


def test_equal_tensors_of_all_blocks_are_stored_once() -> None:
    skeleton = skeleton_in_memory(MaskedModel(independent))
    calls, ids = RecordedCalls(skeleton), tokens(2, 6)
    recorded = [calls.call(index, ids, torch.ones(2, 6, 8)) for index in range(3)]
    masks = {id(tensor) for call in recorded for tensor in tensors_in(recorded_calls._values(call))}
    assert len(masks) == 1
    assert recorded_calls._nbytes(calls._by_shape[2, 6]) == 4 * 2 * 6
    assert [call.kwargs["extra"]["name"] for call in recorded] == ["full"] * 3
    assert all(call.hidden.is_meta for call in calls._by_shape[2, 6]), "no hidden state is kept"


def test_masks_that_take_too_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = skeleton_in_memory(MaskedModel(independent))
    ids, hidden = tokens(2, 6), torch.ones(2, 6, 8)
    for limit, kept in ((4 * 2 * 6, True), (4 * 2 * 6 - 1, False)):
        monkeypatch.setattr(recorded_calls, "KEPT_BYTES", limit)
        calls = RecordedCalls(skeleton)
        assert torch.equal(calls.call(2, ids, hidden).args[1], torch.ones(2, 6))
        assert bool(calls._by_shape) is kept
