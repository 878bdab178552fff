"""Feed a block all of its calibration text, and stop in front of each group of weights.

What o_proj is fed depends on how q, k and v were rounded.  So statistics are taken in the order in which the block
runs: when a group of weights has seen its input of every batch, the caller rounds it, and only then does any batch go
on.  Two ways lead there, with the same numbers:

* **held**: the forward of every batch stands still in front of the group, as a greenlet (its Python frames are kept,
  with the activations that they hold), and goes on where it stood.  One forward in all, and its outputs are the next
  block's inputs.
* **repeated**: where the activations of all batches do not fit into memory at once, each group's input is computed
  again from the block's, as far as that group and no further; then the whole block once more.  About twice the work
  (for a Llama block 2.2 forwards), in the memory of one batch.

Greenlets and not threads, because all of them run in one thread: a second one would have a second pool of OpenMP
workers.  They switch in a hook of the linear layer, between two torch operations.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmq.model.block import Block
from llmq.model.observe import InputGroup
from llmq.model.skeleton import Call
from llmq.stats import InputStats

HELD_WIDTHS = 4  # hidden states that a suspended forward keeps besides the input it stands in front of: an estimate

Calls = Callable[[], Iterable[Call]]


class Flow:
    """One block's forward over all batches, group by group; `outputs` holds each batch's output when it is done."""

    def __init__(self, block: Block, groups: Sequence[InputGroup], calls: Calls, *, held: bool) -> None:
        self._block = block
        self._groups = groups
        self._calls = calls
        self._held = held
        self.outputs: list[Tensor] = []

    def statistics(self) -> Iterator[tuple[InputGroup, InputStats]]:
        """Each group with what its weights are fed; they are to be rounded before the next is asked for."""
        return self._suspended() if self._held else self._repeated()

    def _suspended(self) -> Iterator[tuple[InputGroup, InputStats]]:
        from greenlet import getcurrent, greenlet

        reached: dict[int, tuple[InputGroup, Tensor]] = {}  # batch -> the group it stands in front of, and its input
        outputs: dict[int, Tensor] = {}
        rounded: set[InputGroup] = set()
        forwards: list[Any] = []
        caller = getcurrent()

        def wait(group: InputGroup, inputs: Tensor) -> None:
            if group not in rounded:
                caller.switch((group, inputs))

        def resume(batch: int) -> None:
            arrived = forwards[batch].switch()
            if forwards[batch].dead:
                outputs[batch] = arrived
            else:
                reached[batch] = arrived

        with _in_front_of(self._block, self._groups, wait):
            try:
                for batch, call in enumerate(self._calls()):
                    forwards.append(greenlet(lambda call=call: self._block.run(call)))
                    resume(batch)
                for group in self._groups:
                    here = [batch for batch in sorted(reached) if reached[batch][0] == group]
                    yield group, _summed(self._block, group, (reached[batch][1] for batch in here))
                    rounded.add(group)
                    for batch in here:
                        del reached[batch]
                        resume(batch)
            finally:
                for forward in forwards:  # those that an error left standing
                    if not forward.dead:
                        forward.throw()
        self.outputs = [outputs[batch] for batch in range(len(forwards))]

    def _repeated(self) -> Iterator[tuple[InputGroup, InputStats]]:
        for group in self._groups:
            yield group, _summed(self._block, group, self._inputs(group))
        self.outputs = [self._block.run(call) for call in self._calls()]

    def _inputs(self, group: InputGroup) -> Iterator[Tensor]:
        """What `group` is fed, batch by batch; none for a batch that does not reach it."""

        def leave(_: InputGroup, inputs: Tensor) -> None:
            raise _Reached(inputs)

        for call in self._calls():
            with _in_front_of(self._block, [group], leave):
                try:
                    self._block.run(call)
                except _Reached as reached:
                    yield reached.inputs


class _Reached(Exception):  # noqa: N818  (it ends a forward, nothing went wrong)
    """Ends a forward in front of the group whose input is wanted."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


@contextmanager
def _in_front_of(
    block: Block, groups: Sequence[InputGroup], arrived: Callable[[InputGroup, Tensor], None]
) -> Iterator[None]:
    """While open, `arrived(group, input)` is called whenever the first weight of a group is about to be used."""

    def hook(group: InputGroup) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: arrived(group, args[0] if args else kwargs["input"])

    handles = [
        block.linears[group.names[0]].register_forward_pre_hook(hook(group), with_kwargs=True) for group in groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summed(block: Block, group: InputGroup, inputs: Iterable[Tensor]) -> InputStats:
    stats = InputStats(group.in_features, block.linears[group.names[0]].weight.device)
    for each in inputs:
        stats.update(each)
    return stats


def held_bytes(block: Block, groups: Sequence[InputGroup], tokens: int) -> int:
    """About what suspended forwards of so many tokens keep in memory: the widest input, and a few hidden states."""
    if not groups:
        return 0
    widest = max(group.in_features for group in groups)
    narrowest = min(group.in_features for group in groups)
    itemsize = block.linears[groups[0].names[0]].weight.element_size()
    return tokens * itemsize * (widest + HELD_WIDTHS * narrowest)
