"""Feed a block all of its calibration text, and stop in front of each group of weights.

What o_proj is fed depends on how q, k and v were rounded.  So statistics are taken in the order in which the block
runs: when a group of weights has seen its input of every batch, the caller rounds it, and only then does any batch go
on.  Two ways lead there, with the same numbers:

* **held**: the forward of every batch stands still in front of the group, as a greenlet (its Python frames are kept,
  with the activations that they hold), and goes on where it stood.  One forward in all, and its outputs are the next
  block's inputs.  Torch's modes (autograd, autocast) belong to the thread, so each switch puts back those of the side
  that goes on.
* **repeated**: where the activations of all batches do not fit into memory at once, each group's input is computed
  again from the block's, as far as that group and no further; then the caller runs the whole block once more.  About
  twice the work (for a Llama block 2.2 forwards), in the memory of one batch.

The experts of a layer have one stop for each of their two projections; see `model/passes/statistics.py`.

Where a stage wants to know what the float model feeds a weight, a second stream runs beside the first: the same batches
on the float model's hidden states, with the parameters that the block had before any was rounded.

Greenlets and not threads, because all of them run in one thread: a second one would have a second pool of OpenMP
workers.  They switch in a hook of the linear layer, between two torch operations.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block, Call
from llmq.model.passes.statistics import Arrival, Fed, Stop, Summation, TokenWeights, stops_of
from llmq.numerics.input_stats import InputStats

Calls = Callable[[], Iterable[Call]]
Weights = Callable[[], AbstractContextManager[None]]  # while open, the block has a stream's weights
Forward = tuple[int, int]  # stream and batch


class Flow:
    """One block's forward over all batches, group by group.

    `outputs` and `original_outputs` are each batch's output in either stream when it is done; None where they are
    still to be computed.

    originals  the calls of the float stream, where it is to run beside the quantized one, with the parameters that
               `Block.keep_originals` has found
    fitted     how many batches statistics are for; those behind them go to `InputStats.held_out`
    weights    how much each token of all batches counts in a group's statistics
    tokens_per_input  how many tokens an expert's statistics take for each of its inputs
    held       whether forwards stand still or are repeated
    at_once    of how many experts statistics are taken in one pass where forwards are repeated
    """

    def __init__(
        self,
        block: Block,
        groups: Sequence[InputGroup],
        calls: Calls,
        originals: Calls | None = None,
        *,
        fitted: int | None = None,
        weights: TokenWeights | None = None,
        tokens_per_input: float = 0.0,
        held: bool,
        at_once: int = 1,
    ) -> None:
        self._block = block
        self._stops = stops_of(block, groups)
        self._streams: list[tuple[Calls, Weights]] = [(calls, nullcontext)]
        if originals is not None:
            self._streams.append((originals, block.originals))
        self._sums = Summation(block, fitted=fitted, weights=weights, tokens_per_input=tokens_per_input)
        self._held = held
        self._at_once = at_once
        self.outputs: list[Tensor] | None = None
        self.original_outputs: list[Tensor] | None = None

    def statistics(self) -> Iterator[tuple[InputGroup, InputStats]]:
        """Each group with what its weights are fed; they are to be rounded before the next is asked for."""
        return self._suspended() if self._held else self._repeated()

    def _suspended(self) -> Iterator[tuple[InputGroup, InputStats]]:
        from greenlet import getcurrent, greenlet

        reached: dict[Forward, tuple[Stop, Arrival]] = {}  # where it stands, and what arrived there
        outputs: list[dict[int, Tensor]] = [{} for _ in self._streams]
        tokens: list[int] = []  # of each batch
        passed: list[Stop] = []
        forwards: dict[Forward, Any] = {}
        caller = getcurrent()
        device = next((linear.weight.device.type for linear in self._block.linears.values()), "cpu")

        def wait(stop: Stop, arrived: Arrival) -> None:
            if not any(stop is each for each in passed):
                with _modes_kept(device):
                    caller.switch((stop, arrived))

        def resume(forward: Forward) -> None:
            stream, batch = forward
            with _modes_kept(device), self._streams[stream][1]():
                arrived = forwards[forward].switch()
            if forwards[forward].dead:
                outputs[stream][batch] = arrived
            else:
                reached[forward] = arrived

        with _in_front_of(self._stops, wait):
            try:
                for batch, calls in enumerate(self._calls()):
                    tokens.append(_tokens(calls[0]))
                    for stream, call in enumerate(calls):
                        forwards[stream, batch] = greenlet(lambda call=call: self._block.run(call))
                        resume((stream, batch))
                for stop in self._stops:
                    here = sorted(forward for forward, (where, _) in reached.items() if where is stop)
                    arrived = {forward: reached.pop(forward)[1] for forward in here}
                    streams = range(len(self._streams))
                    fed = [([arrived.get((s, batch)) for s in streams], count) for batch, count in enumerate(tokens)]
                    if self._sums.needs_counting(stop):
                        self._sums.count(stop, fed)
                    for group in stop.groups:
                        [stats] = self._sums.sums(stop, [group], fed)
                        yield group, stats
                        del stats
                    passed.append(stop)
                    arrived.clear()
                    del fed
                    for forward in here:
                        resume(forward)
            finally:
                for forward in forwards.values():  # those that an error left standing
                    if not forward.dead:
                        with _modes_kept(device):
                            forward.throw()
        self.outputs, *others = ([each[batch] for batch in range(len(tokens))] for each in outputs)
        self.original_outputs = others[0] if others else None

    def _repeated(self) -> Iterator[tuple[InputGroup, InputStats]]:
        for stop in self._stops:
            if self._sums.needs_counting(stop):
                self._sums.count(stop, self._arrivals(stop))
            for start in range(0, len(stop.groups), self._at_once):
                groups = stop.groups[start : start + self._at_once]
                yield from zip(groups, self._sums.sums(stop, groups, self._arrivals(stop)), strict=True)

    def _arrivals(self, stop: Stop) -> Iterator[Fed]:
        """What arrives of each batch at a stop; None for one that does not come there."""

        def leave(_: Stop, arrived: Arrival) -> None:
            raise _Reached(arrived)

        def reach(call: Call, weights: Weights) -> Arrival | None:
            with _in_front_of([stop], leave), weights():
                try:
                    self._block.run(call)
                except _Reached as reached:
                    return reached.arrived
            return None

        for calls in self._calls():
            reached = [reach(call, weights) for call, (_, weights) in zip(calls, self._streams, strict=True)]
            yield reached, _tokens(calls[0])

    def _calls(self) -> Iterator[tuple[Call, ...]]:
        """Batch by batch, the block's call in each stream."""
        return zip(*(calls() for calls, _ in self._streams), strict=True)


class _Reached(Exception):  # noqa: N818  (it ends a forward, nothing went wrong)
    """Ends a forward at the stop that is asked for."""

    def __init__(self, arrived: Arrival) -> None:
        self.arrived = arrived


@contextmanager
def _modes_kept(device: str) -> Iterator[None]:
    """Whatever happens inside, autograd and the autocast of a type of device are then as they were."""
    gradient, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    try:
        yield
    finally:
        torch.set_grad_enabled(gradient)
        torch.set_autocast_enabled(device, autocast)
        torch.set_autocast_dtype(device, dtype)


def why_not_held() -> str | None:
    """What keeps forwards from standing still in this environment, if anything does."""
    try:
        import greenlet  # noqa: F401
    except ImportError as error:
        return f"greenlet cannot be imported ({error})"
    return None


@contextmanager
def _in_front_of(stops: Sequence[Stop], arrived: Callable[[Stop, Arrival], None]) -> Iterator[None]:
    """While open, `arrived` is called whenever a forward comes to a stop."""

    def hook(stop: Stop) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: arrived(stop, args[0] if args else kwargs["input"])

    handles = [stop.module.register_forward_pre_hook(hook(stop), with_kwargs=True) for stop in stops]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(call: Call) -> int:
    """How many tokens a batch has, B · T."""
    return call.hidden.shape[-3:-1].numel()


def held_bytes(block: Block, groups: Sequence[InputGroup], call: Call) -> int:
    """What a forward of `call` keeps in memory while it stands in front of a group, at the place where that is most.

    Found by running it: how many activations, masks and attention weights a model's code has at hand is its own choice.
    """
    most = 0

    def look(_: Stop, __: Arrival) -> None:
        nonlocal most
        most = max(most, _bytes_in_frames(sys._getframe(1), held_bytes.__code__, call.hidden))

    with _in_front_of(stops_of(block, groups), look):
        block.run(call)
    return most


def _bytes_in_frames(frame: FrameType | None, last: CodeType, hidden: Tensor) -> int:
    """Bytes of the tensors that the local variables of `frame` and its callers refer to, as far as `last`.

    That one is named by its code: a frame that refers to itself lives on, and so does all that its callers hold.
    `hidden` may be a part of what the stream holds of a whole batch, so of its memory only that part counts.
    """
    storages = {hidden.untyped_storage().data_ptr(): hidden.nbytes}
    while frame is not None and frame.f_code is not last:
        values = list(frame.f_locals.values())
        while values:
            value = values.pop()
            if type(value) is Tensor:  # and not a parameter
                storages.setdefault(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes())
            elif type(value) in (tuple, list):
                values += value
            elif type(value) is dict:
                values += value.values()
        frame = frame.f_back
    return sum(storages.values())
