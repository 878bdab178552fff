"""Stacked experts of a checkpoint, as one tensor per expert: the form in which the other code writes them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmq.gguf.architecture import Stacked

if TYPE_CHECKING:
    from llmq.gguf.stored import Stored

_STACK = re.compile(
    r"(.+)\.(?:experts\.(gate_up_proj|up_proj|down_proj)(_bias)?|(input_linear|output_linear)\.weight)$"
)
_USUAL = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}  # of Granite


def separated(tensors: Iterable["Stored"], form: Stacked) -> Iterator["Stored"]:
    """The tensors, with `experts.gate_up_proj` (E, 2 N, K) as `experts.0.gate_proj.weight`, `experts.0.up_proj.weight`
    and so on; `input_linear.weight` and `output_linear.weight` alike.

    The parts of a stack share one read, if they are read one after the other.
    """
    for tensor in tensors:
        match = _STACK.match(tensor.name)
        if match is None or tensor.kind is not None:
            yield tensor
            continue
        prefix, name, bias, own = match.groups()
        name = name or _USUAL[own]
        read = lru_cache(maxsize=1)(tensor.read)
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        experts, *shape = tensor.shape
        if form.transposed and not bias:
            shape.reverse()
        for expert in range(experts):
            for i, part in enumerate(names):
                rows = np.arange(shape[0])
                if len(names) == 2:
                    rows = rows[i::2] if form.in_turn else np.split(rows, 2)[i]
                yield replace(
                    tensor,
                    name=f"{prefix}.experts.{expert}.{part}.{'bias' if bias else 'weight'}",
                    shape=(len(rows), *shape[1:]),
                    read=partial(_part, read, expert, rows, form.transposed and not bias),
                )


def _part(read: Any, expert: int, rows: NDArray[np.int64], transposed: bool) -> NDArray[Any]:
    weight = read()[expert]
    part: NDArray[Any] = (weight.T if transposed else weight)[rows]
    return part
