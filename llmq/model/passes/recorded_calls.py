"""The arguments of blocks in addition to their hidden state: recorded once per batch shape.

Masks, rotary tables and the like usually depend only on the shape of a batch. This is checked: the calls of every batch
are recorded when it enters the first block, and for the first batch of a shape also with all token ids shifted by one.
If anything differs, the calls are recorded again for each block and batch, and nothing is kept.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.model.build.block import Call
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.replay import tensors_in

KEPT_BYTES = 2**28  # limit for masks and tables of one shape; models with more are recorded again each time


class RecordedCalls:
    """The calls of every block of a skeleton, for any tokens (B, T) int64."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._by_shape: dict[tuple[int, ...], list[Call]] = {}
        self._depend_on_tokens = False

    def first(self, tokens: Tensor, *, seen: bool = False) -> Call:
        """The call of the first block; the hidden state is the embedding of `tokens`.

        seen  whether the same tokens were recorded before, so that nothing has to be compared
        """
        if self._depend_on_tokens or (seen and tuple(tokens.shape) in self._by_shape):
            return self._skeleton.record(0, tokens)
        return self._learn(tokens)[0]

    def call(self, index: int, tokens: Tensor, hidden: Tensor) -> Call:
        """The call of block `index` for `tokens`, with the hidden state `hidden` (…, B, T, D)."""
        if not self._depend_on_tokens and tuple(tokens.shape) not in self._by_shape:
            self._learn(tokens)
        if self._depend_on_tokens:
            return self._skeleton.record(index, tokens).with_hidden(hidden)
        return self._by_shape[tuple(tokens.shape)][index].with_hidden(hidden)

    def _learn(self, tokens: Tensor) -> list[Call]:
        """Record the calls of all blocks for these tokens, and compare them with the known calls for this shape."""
        calls = self._skeleton.record_all(tokens)
        shape = tuple(tokens.shape)
        known = self._by_shape.get(shape)
        if known is None:
            shifted = self._skeleton.record_all((tokens + 1) % self._skeleton.vocabulary)
            known = _shared([_without_hidden(call) for call in shifted])
            self._by_shape[shape] = known
        same = all(_same(_values(call), _values(expected)) for call, expected in zip(calls, known, strict=True))
        if not same or _nbytes(known) > KEPT_BYTES:
            self._depend_on_tokens = True
            self._by_shape = {}
        return calls


def _without_hidden(call: Call) -> Call:
    return call.with_hidden(call.hidden.to("meta"))


def _values(call: Call) -> tuple[Any, ...]:
    """All arguments except the hidden state."""
    return (call.args[1:], {name: value for name, value in call.kwargs.items() if name != "hidden_states"})


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, tensors bit for bit; values of unknown types are not."""
    if value is other:
        return True
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        alike = value.shape == other.shape and value.dtype == other.dtype
        return alike and torch.equal(value, other)
    if type(value) is not type(other):
        return False
    if isinstance(value, tuple | list):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    return isinstance(value, bool | int | float | str) and value == other


def _shared(calls: list[Call]) -> list[Call]:
    """The same calls, where equal tensors are the same object, so memory does not grow with the number of blocks."""
    tensors: list[Tensor] = []

    def deduplicated(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_meta:
            match = next((tensor for tensor in tensors if _same(tensor, value)), None)
            if match is None:
                tensors.append(value)
            return value if match is None else match
        if type(value) in (tuple, list):
            return type(value)(map(deduplicated, value))
        return {key: deduplicated(item) for key, item in value.items()} if type(value) is dict else value

    return [replace(call, args=deduplicated(call.args), kwargs=deduplicated(call.kwargs)) for call in calls]


def _nbytes(calls: list[Call]) -> int:
    tensors = {id(tensor): tensor.nbytes for call in calls for tensor in tensors_in(_values(call))}
    return sum(tensors.values())
