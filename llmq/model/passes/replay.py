"""Run the forward of a block as far as some layer, and later on from there.

A forward ends in front of a layer whose weight is not settled yet, with what the layer is about to be fed.  The next
time it starts again at the top of the block, but a module that returned before is not run again: it holds no weight
that was still to change, so what it put out is final.  Between such modules lies what a block's own code computes:
sums with the residual, products of activations.  So a forward that is continued does its matrix products once, and its
numbers are those of one plain forward, bit by bit.

A module whose output was changed in place after it returned, or which changes its own input, is run again: its effects
are part of the forward.  Where there is no memory for outputs, `remember=False` runs everything again each time, to the
same bits.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmq.model.build.block import Block, Call
from llmq.model.experts.separate import Routed

Arrival = Tensor | Routed
"""What a layer, or all experts of a layer, are about to be fed."""


class _Reached(Exception):  # noqa: N818  (it ends a forward, nothing went wrong)
    """Ends a forward in front of a module."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival


@dataclass(frozen=True)
class _Finished:
    """One call of a module that returned: what it put out, and the versions of the tensors in that."""

    module: nn.Module
    output: Any
    versions: tuple[int, ...]

    def is_final(self) -> bool:
        return self.versions == _versions(self.output)


class Replay:
    """The forwards of one block, each under a key of the caller's; a context in which they can be continued."""

    def __init__(self, block: Block, *, remember: bool) -> None:
        self._block = block
        self._remember = remember
        self._finished: dict[Hashable, list[_Finished]] = {}  # of each forward: its outermost finished calls, in order
        self._log: list[_Finished] | None = None  # of the forward that runs now
        self._next = 0  # the place in it
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> "Replay":
        modules = [m for m in self._block.module.modules() if m is not self._block.module and "forward" not in vars(m)]
        # A module without parameters, such as an activation, is cheaper to run again than to remember.
        self._replaced = [m for m in modules if next(m.parameters(), None) is not None] if self._remember else []
        for module in self._replaced:
            module.forward = self._replayed(module, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        self._finished = {}
        for module in self._replaced:
            del module.forward  # the class's own shows again

    def run_to(self, key: Hashable, call: Call, module: nn.Module) -> Arrival | None:
        """What arrives at `module` when the block is run on `call`; None if the forward never comes there."""
        with in_front_of(module, _leave):
            try:
                self._run(key, call)
            except _Reached as reached:
                return reached.arrival
        return None

    def finish(self, key: Hashable, call: Call) -> Tensor:
        """What the block puts out for `call`; the forward is forgotten."""
        output = self._run(key, call)
        self._finished.pop(key, None)
        return output

    def nbytes(self, key: Hashable) -> int:
        """Bytes that a forward keeps."""
        tensors = [tensor for done in self._finished.get(key, ()) for tensor in tensors_in(done.output)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _run(self, key: Hashable, call: Call) -> Tensor:
        self._log, self._next = self._finished.setdefault(key, []), 0
        try:
            return self._block.run(call)
        finally:
            self._log = None

    def _replayed(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            log = self._log
            if log is None:  # a module that is used by itself, and not as a part of the block's forward
                return forward(*args, **kwargs)
            start = self._next
            if start < len(log) and log[start].module is module and log[start].is_final():
                self._next += 1
                return log[start].output
            if start < len(log) and not log[start].is_final():
                del log[start:]
            fed = (args, tuple(kwargs.values()))
            before = _versions(fed)
            output = forward(*args, **kwargs)
            if before == _versions(fed):  # what finished inside of it is part of this output
                log[start:] = [_Finished(module, output, _versions(output))]
                self._next = start + 1
            return output

        return run


def _leave(arrival: Arrival) -> None:
    raise _Reached(arrival)


@contextmanager
def in_front_of(module: nn.Module, arrived: Callable[[Arrival], None]) -> Iterator[None]:
    """While open, `arrived` is called with what `module` is about to be fed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived(args[0] if args else kwargs["input"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value that modules pass on: in tuples, lists, dicts and `Routed`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Routed):
        yield from tensors_in([value.hidden, *value.rows, *(value.inner or ())])


def _versions(value: Any) -> tuple[int, ...]:
    """How often each tensor in `value` was changed in place."""
    return tuple(tensor._version for tensor in tensors_in(value))
