"""Models whose blocks cannot run one by one, and are refused by every stage that runs blocks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmq.errors import UnsupportedModelError
from llmq.model.build.block import Call


def refused(model: nn.Module, reason: str) -> UnsupportedModelError:
    """The error for such a model."""
    message = f"{type(model).__name__} cannot be replayed block by block: {reason}"
    return UnsupportedModelError(message, hint="rtn needs no replay")


def require_own_keys(model: nn.Module) -> None:
    """Raise UnsupportedModelError for blocks that use keys and values of earlier blocks, as some of Gemma 3n do."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    sharing = getattr(config, "num_kv_shared_layers", 0)
    if sharing:
        raise refused(model, f"its last {sharing} blocks share the keys and values of earlier blocks")


def require_single_runs(model: nn.Module, repeated: Sequence[str]) -> None:
    """Raise UnsupportedModelError for blocks that run several times per token; these are `repeated`."""
    if repeated:
        raise refused(model, f"it runs {repeated[0]} several times per token ({len(repeated)} such blocks)")


@contextmanager
def returning_nothing_else(blocks: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """While open, collects the blocks that return a tuple with None for all values besides the hidden state."""
    plain: set[nn.Module] = set()

    def note(block: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple | list) and all(value is None for value in output[1:]):
            plain.add(block)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield plain
    finally:
        for handle in handles:
            handle.remove()


def handed_on(calls: Iterable[Call], value: object) -> str | None:
    """The name of an argument that is `value` in one of these calls; None without one."""
    for call in calls:
        names = [f"argument {place}" for place, argument in enumerate(call.args) if argument is value]
        names += [name for name, argument in call.kwargs.items() if argument is value]
        if names:
            return names[0]
    return None
