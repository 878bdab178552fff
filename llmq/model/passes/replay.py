"""Run the forward of a block up to a layer, and continue it later.

A forward ends before a layer whose weight is not quantized yet, and returns the input of this layer. To continue, the
forward starts again at the top of the block, but modules that returned before are not run again: their weights do not
change any more, so their outputs are final and were kept. Only the block's code between modules is repeated: sums with
the residual, products of activations. So every matrix product is computed once, and the results are those of one plain
forward, bit for bit.

A batch may take another way through the block, past layers that are not quantized yet. What follows such a layer is
not kept. A module whose output was changed in place after it returned, or which changes its input, is run again,
because its side effects are part of the forward. If there is no memory for the outputs, `remember=False` runs
everything again each time, with the same bits.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmq.model.build.block import Block, Call
from llmq.model.experts.separate import Routed

Arrival = Tensor | Routed
"""The input of a layer, or of all experts of a layer."""


class _Reached(Exception):  # noqa: N818  (it ends a forward and is not an error)
    """Ends a forward before a module is run."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival


@dataclass(frozen=True)
class _Finished:
    """One call of a module that returned: its output, and the versions of the tensors in the output."""

    module: nn.Module
    output: Any
    versions: tuple[int, ...]

    def is_final(self) -> bool:
        return self.versions == _versions(self.output)


class Replay:
    """The forwards of one block, by keys that the caller chooses; a context in which they can be continued.

    unquantized  layers whose weights still change, until `settle`; modules that contain one are always run again
    """

    def __init__(self, block: Block, *, remember: bool, unquantized: Iterable[nn.Module] = ()) -> None:
        self._block = block
        self._remember = remember
        self._unquantized = set(unquantized)
        self._finished: dict[Hashable, list[_Finished]] = {}  # per forward, its outermost finished calls, in order
        self._log: list[_Finished] | None = None  # those of the forward that is running
        self._next = 0  # the position in the log
        self._preliminary = False  # whether it has run such a layer, so that all that follows will change
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> "Replay":
        modules = [m for m in self._block.module.modules() if m is not self._block.module and "forward" not in vars(m)]
        # Only modules with a matrix are worth remembering: norms and activations are cheap to run again.
        costly = [m for m in modules if any(parameter.dim() > 1 for parameter in m.parameters())]
        self._replaced = costly if self._remember else []
        for module in self._replaced:
            module.forward = self._replayed(module, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()
        for module in self._replaced:
            del module.forward  # makes the forward of the class visible again

    def forget(self) -> None:
        """Free what the forwards have kept."""
        self._finished = {}

    def settle(self, layers: Iterable[nn.Module]) -> None:
        """The weights of these layers do not change any more."""
        self._unquantized.difference_update(layers)

    def run_to(self, key: Hashable, call: Call, module: nn.Module) -> Arrival | None:
        """The input of `module` when the block is run on `call`; None if the module is not run."""
        with in_front_of(module, _leave):
            try:
                self._run(key, call)
            except _Reached as reached:
                return reached.arrival
        return None

    def finish(self, key: Hashable, call: Call) -> Tensor:
        """The output of the block for `call`; what was kept of the forward is freed."""
        output = self._run(key, call)
        self._finished.pop(key, None)
        return output

    def nbytes(self, key: Hashable) -> int:
        """Bytes that a forward keeps."""
        tensors = [tensor for finished in self._finished.get(key, ()) for tensor in tensors_in(finished.output)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    def _run(self, key: Hashable, call: Call) -> Tensor:
        self._log, self._next, self._preliminary = self._finished.setdefault(key, []), 0, False
        try:
            return self._block.run(call)
        finally:
            self._log = None

    def _replayed(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            log = self._log
            if log is None:  # the module is called directly and not in the block's forward
                return forward(*args, **kwargs)
            start = self._next
            if start < len(log) and log[start].module is module and log[start].is_final():
                self._next += 1
                return log[start].output
            if start < len(log) and not log[start].is_final():
                del log[start:]
            inputs = (args, tuple(kwargs.values()))
            before = _versions(inputs)
            output = forward(*args, **kwargs)
            self._preliminary |= not self._unquantized.isdisjoint(module.modules())
            if before == _versions(inputs) and not self._preliminary:  # replaces the calls inside of this one
                log[start:] = [_Finished(module, output, _versions(output))]
                self._next = start + 1
            return output

        return run


def _leave(arrival: Arrival) -> None:
    raise _Reached(arrival)


@contextmanager
def in_front_of(module: nn.Module, arrived: Callable[[Arrival], None]) -> Iterator[None]:
    """While open, `arrived` is called with the input of `module` before the module is run."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived(args[0] if args else kwargs["input"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value that modules return: in tuples, lists, dicts and `Routed`."""
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
