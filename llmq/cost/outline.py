"""What a model costs per calibration sequence, observed by running it on the meta device: no weight is read.

The whole model runs once, so that the arguments of every block are known. Then each kind of block runs on its own, with
the code of a real run: forwards that are suspended before each input group (`model/passes/replay.py`), and a forward
with its graph and its backward pass (`model/passes/backward.py`). FLOPs, bytes and sizes are counted, not derived, so
they follow the code, and any architecture works. Only experts are derived from their shapes: where tokens go depends on
values, which do not exist on the meta device.

Attention runs as two plain matrix products here. A fused attention computes the same products, and its graph has no
matrix of tokens x tokens, so such matrices are left out of the graph's size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.cost.counting import Counted, Counter
from llmq.errors import UnsupportedModelError
from llmq.model.analyse import meta_run
from llmq.model.analyse.input_groups import InputGroup, watching
from llmq.model.build.block import Block, Call
from llmq.model.build.layout import Layout
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import SeparateExperts
from llmq.model.passes.backward import differentiable, gradients_of
from llmq.model.passes.generate import cache_bytes
from llmq.model.passes.replay import Replay, tensors_in
from llmq.model.passes.statistics import stops_of


@dataclass(frozen=True)
class Layer:
    """A linear layer: `name` relative to its block, and the share of all tokens that reach it (experts: below 1)."""

    name: str
    out_features: int
    in_features: int
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockOutline:
    """A kind of block, per sequence; sizes in elements of the dtype in which the block computes.

    layers        its linear layers
    groups        numbers of `layers` that share an input, in the order in which they run
    parameters    number of parameters
    forward       one forward
    suspended     a forward that is suspended before every group, and ends before the last group
    until         the parts of that forward, up to each group
    finished      the rest of that forward
    repeated      as `suspended`, when the forward starts again at the top of the block for each group
    backward      the gradient of the block's input
    both          the gradients of the input and of all linear layers
    of_weights    the gradients of all linear layers only
    kept          elements that a suspended forward keeps
    graph         elements that the graph of a forward keeps
    arguments     elements of masks, rotary tables and other arguments
    """

    layers: tuple[Layer, ...]
    groups: tuple[tuple[int, ...], ...]
    parameters: int
    forward: Counted
    suspended: Counted
    until: tuple[Counted, ...]
    finished: Counted
    repeated: Counted
    backward: Counted
    both: Counted
    of_weights: Counted
    kept: int
    graph: int
    arguments: int


@dataclass(frozen=True)
class Outline:
    """A model, as far as its cost depends on it.

    blocks      one per block; equal blocks are equal
    paths       the path of each block
    length      tokens per sequence, for which everything is counted
    width       D, the inputs of the head
    hidden      elements of the hidden state of one sequence
    vocabulary  V
    outside     number of stored parameters outside of the blocks
    tied        whether the head shares the embedding's weight
    itemsize    bytes per element in which the blocks compute
    cache       bytes of keys and values per token, when the model generates text
    """

    blocks: tuple[BlockOutline, ...]
    paths: tuple[str, ...]
    length: int
    width: int
    hidden: int
    vocabulary: int
    outside: int
    tied: bool
    itemsize: int
    cache: int


def observe(skeleton: Skeleton, length: int) -> Outline:
    """Observe a model on sequences of `length` tokens. Raises UnsupportedModelError if it cannot run on meta."""
    try:
        with meta_run.buffers_without_values(block.module for block in skeleton.blocks):
            return _observe(skeleton, length)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model may raise anything
        first = str(error).partition("\n")[0]
        raise _not_observed(skeleton, f"{type(error).__name__}: {first}") from error


def _not_observed(skeleton: Skeleton, reason: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(skeleton.model).__name__} cannot be run without weights: {reason}",
        hint="its cost cannot be estimated; quantize it without an estimate",
    )


def _observe(skeleton: Skeleton, length: int) -> Outline:
    calls: dict[int, Call] = {}
    known: dict[Any, BlockOutline] = {}
    outlines = []
    with skeleton.without_reading(), _experts_skipped(skeleton) as shares:
        _run_model(skeleton, length, calls)
        for block in skeleton.blocks:
            key = _signature(block, calls[block.index])
            if key not in known:
                known[key] = _observe_block(block, calls[block.index], shares)
            outlines.append(known[key])
    weights, model = skeleton.weights, skeleton.model
    inside = sum(outline.parameters for outline in outlines)
    stored = sum(p.numel() for name, p in model.named_parameters() if not weights.is_tied(name))
    head = skeleton.head_path
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return Outline(
        blocks=tuple(outlines),
        paths=tuple(block.path for block in skeleton.blocks),
        length=length,
        width=int(embedding.get_parameter("weight").shape[1]),
        hidden=calls[0].raw.numel(),
        vocabulary=skeleton.vocabulary,
        outside=stored - inside,
        tied=head is not None and weights.is_shared(f"{head}.weight"),
        itemsize=calls[0].raw.element_size(),
        cache=cache_bytes(skeleton),
    )


def _run_model(skeleton: Skeleton, length: int, calls: dict[int, Call]) -> None:
    def recorder(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raw = args[0] if args else kwargs["hidden_states"]
            calls[index] = Call(args, kwargs, Layout.of(raw, length) or Layout.BATCH_FIRST)

        return record

    handles = [b.module.register_forward_pre_hook(recorder(b.index), with_kwargs=True) for b in skeleton.blocks]
    try:
        failures = meta_run.run(skeleton.model, tokens=length)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < len(skeleton.blocks):
        raise _not_observed(skeleton, [*failures.values(), "unknown"][0])


@contextmanager
def _experts_skipped(skeleton: Skeleton) -> Iterator[dict[str, float]]:
    """While open, layers of experts return their input; yields the share of tokens per expert, by path."""
    shares: dict[str, float] = {}
    experts = {path: module for block in skeleton.blocks for path, module in block.experts.items()}

    def skipping(path: str, module: SeparateExperts) -> Callable[..., Tensor]:
        def skip(hidden: Tensor, top_k_index: Tensor | None = None, *_: Any) -> Tensor:
            shares[path] = 1.0 if top_k_index is None else top_k_index.shape[-1] / module.expert_count
            return hidden.clone()

        return skip

    for path, module in experts.items():
        module.forward = skipping(path, module)  # type: ignore[method-assign]
    try:
        yield shares
    finally:
        for module in experts.values():
            del module.forward  # makes the forward of the class visible again


def _signature(block: Block, call: Call) -> Any:
    """Equal for blocks with the same cost."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.module.named_parameters())
    linears = tuple(path.removeprefix(block.path) for path in block.linears)
    arguments = tuple(tuple(tensor.shape) for tensor in tensors_in([call.args, call.kwargs]))
    return type(block.module), shapes, linears, arguments


def _observe_block(block: Block, call: Call, shares: dict[str, float]) -> BlockOutline:
    paths = list(block.linears)
    layers = tuple(_layer(block, path, shares) for path in paths)
    length = call.hidden.shape[-2]
    routed = [layer for layer, path in zip(layers, paths, strict=True) if block.is_experts(path)]
    experts = Counted(sum(2 * length * layer.share * layer.weights for layer in routed))
    expert_outputs = sum(round(length * layer.share) * layer.out_features for layer in routed)
    groups = [*_groups(block, call), *_expert_groups(block)]
    until, finished, kept = _replayed(block, groups, call, remember=True)
    again, _, _ = _replayed(block, groups, call, remember=False)
    suspended, repeated = sum(until, Counted()), sum(again, Counted())
    of_experts = [experts * (1 / (len(groups) - len(until)))] * (len(groups) - len(until)) if routed else []
    forward, backward, _ = _with_graph(block, call, ())
    trained = [path for path in paths if not block.is_experts(path)]
    _, both, graph = _with_graph(block, call, trained)
    _, of_weights, _ = _with_graph(block, call, trained, of_input=not trained)
    numbers = {path: number for number, path in enumerate(paths)}
    return BlockOutline(
        layers=layers,
        groups=tuple(tuple(numbers[name] for name in group.names) for group in groups),
        parameters=sum(parameter.numel() for parameter in block.module.parameters()),
        forward=forward + experts,
        suspended=suspended + experts,
        until=(*until, *of_experts),
        finished=finished,
        repeated=repeated + experts * 2,
        backward=backward + experts,
        both=both + experts * 2,
        of_weights=of_weights + experts * 2,
        kept=kept + expert_outputs,
        graph=graph + 2 * expert_outputs,
        arguments=sum(tensor.numel() for tensor in tensors_in([call.args[1:], call.kwargs])),
    )


def _layer(block: Block, path: str, shares: dict[str, float]) -> Layer:
    linear = block.linears[path]
    share = next((share for experts, share in shares.items() if path.startswith(f"{experts}.")), 1.0)
    return Layer(path.removeprefix(f"{block.path}."), linear.out_features, linear.in_features, share)


def _groups(block: Block, call: Call) -> list[InputGroup]:
    """As `input_groups.input_groups`; tensors on meta have no address, so their identity is compared."""
    first: dict[int, list[str]] = {}
    alive: list[Tensor] = []

    def seen(name: str, inputs: Tensor) -> None:
        alive.append(inputs)
        first.setdefault(id(inputs), []).append(name)

    with watching(block.linears, seen), meta_run.Zeros():  # type: ignore[no-untyped-call]
        block.run(call)
    return [InputGroup(tuple(dict.fromkeys(names)), block.linears[names[0]].in_features) for names in first.values()]


def _expert_groups(block: Block) -> list[InputGroup]:
    """A group per expert and projection, as in a real run where every expert gets tokens."""
    names = [
        tuple(f"{path}.{e}.{part}" for part in parts)
        for path, experts in block.experts.items()
        for parts in experts.parts
        for e in range(experts.expert_count)
    ]
    present = [group for group in names if all(name in block.linears for name in group)]
    return [InputGroup(group, block.linears[group[0]].in_features) for group in present]


def _replayed(
    block: Block, groups: Sequence[InputGroup], call: Call, *, remember: bool
) -> tuple[list[Counted], Counted, int]:
    """Up to each group, the rest, and the most elements kept; experts are skipped."""
    plain = [group for group in groups if not block.is_experts(group.names[0])]
    kept, until = 0, list[Counted]()
    with ExitStack() as stack:
        stack.enter_context(meta_run.Zeros())  # type: ignore[no-untyped-call]
        unquantized = [block.linears[name] for group in plain for name in group.names]
        replay = stack.enter_context(Replay(block, remember=remember, unquantized=unquantized))
        counter = stack.enter_context(Counter())
        for stop in stops_of(block, plain):
            replay.run_to(0, call, stop.module)
            until.append(counter.counted)
            counter.counted = Counted()
            kept = max(kept, replay.nbytes(0) // call.raw.element_size())
            replay.settle(block.linears[name] for group in stop.groups for name in group.names)
        counter.counted = Counted()
        replay.finish(0, call)
        return until, counter.counted, kept


def _with_graph(
    block: Block, call: Call, paths: Sequence[str], *, of_input: bool = True
) -> tuple[Counted, Counted, int]:
    """The forward, the backward pass with the gradients of the layers `paths`, and the elements of the graph."""
    weights = [block.linears[path].weight for path in paths]
    length, storages = call.hidden.shape[-2], dict[int, int]()
    parameters = {parameter.untyped_storage()._cdata for parameter in block.module.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape[-2:] != (length, length) and storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes() // call.raw.element_size()
        return tensor

    with meta_run.Zeros(), Counter() as counter:  # type: ignore[no-untyped-call]
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            graph = differentiable(block, call, weights, of_input=of_input)
        forward, counter.counted = counter.counted, Counted()
        gradients_of(graph, weights, torch.empty_like(graph[1]))
    return forward, counter.counted, sum(storages.values()) + graph[1].numel()
