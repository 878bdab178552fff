"""Helpers that pass sequences through a skeleton, set up as in a job."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq.algorithms import Options
from llmq.distributed.ranks import ALONE, Ranks
from llmq.memory import HOST
from llmq.methods import Method
from llmq.model.analyse.input_groups import InputGroup, input_groups
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.sequential import Sequential
from llmq.model.passes.statistics import TokenWeights
from llmq.model.passes.streams import Stream, Streams, Text
from llmq.numerics.input_stats import InputStats
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.steps.run import Run

REMEMBERED, REPEATED = 1 << 40, 0  # bytes of memory for recorded activations
CPU_MEMORY = Storage(HOST)


def stream_over(
    skeleton: Skeleton,
    ids: Tensor,
    batch: int = 2,
    *,
    validation: int = 0,
    storage: Storage = CPU_MEMORY,
    to_the_end: bool = True,
) -> Stream:
    """A stream of the sequences `ids` (S, T) before the first block."""
    text = Text(ids, batch, validation)
    return Stream(skeleton, text, RecordedCalls(skeleton), storage, to_the_end=to_the_end)


def streams_over(
    skeleton: Skeleton,
    ids: Tensor,
    batch: int = 2,
    *,
    memory: int = REMEMBERED,
    floats: bool = False,
    validation: int = 0,
    weights: TokenWeights | None = None,
    tokens_per_input: float = 0.0,
    storage: Storage = CPU_MEMORY,
    ranks: Ranks = ALONE,
) -> Streams:
    """The streams of the pipeline, including the float stream if `floats`; of the share of one of several ranks."""
    text, calls = Text(ids, batch, validation).share(ranks), RecordedCalls(skeleton)
    return Streams(
        quantized=Stream(skeleton, text, calls, storage, "quantized"),
        floats=Stream(skeleton, text, calls, storage, "float") if floats else None,
        token_weights=weights,
        tokens_per_input=tokens_per_input,
        memory=memory,
        ranks=ranks,
    )


def halve(block: Block, group: InputGroup) -> None:
    """Stand-in for quantization: later layers of the block must see the changed weights."""
    for path in group.names:
        block.set_weight(path, block.weight(path) * 0.5)


def run_block(
    streams: Streams,
    block: Block,
    quantize: Callable[[Block, InputGroup], None] = halve,
    *,
    at_once: int | None = None,
) -> dict[str, InputStats]:
    """Pass the streams through a block as the pipeline does; returns the statistics by the first layer of each group.

    quantize  is called for each group when its statistics are complete
    at_once   number of groups whose statistics are summed in one pass; by default as many as fit
    """
    block.load()
    streams.enter(block)
    groups = input_groups(block, streams.quantized.sample(streams.text.length))
    seen: dict[str, InputStats] = {}

    def note(turn: Sequence[tuple[InputGroup, InputStats]]) -> None:
        for group, stats in turn:
            seen[group.names[0]] = stats
            quantize(block, group)

    with Sequential(block, groups, streams) as forwards:
        forwards._at_once = at_once or forwards._at_once
        forwards.run(note)
        if streams.floats is not None:
            forwards.finish(streams.floats)
        forwards.finish(streams.quantized)
    streams.advance()
    return seen


def plans_of(block: Block, scheme: WeightScheme, kept: str = "none") -> dict[str, LayerPlan]:
    """Every linear layer of a block on one grid, except those whose path ends in `kept`, which are kept in float."""
    return {
        path: LayerPlan(path, m.out_features, m.in_features, Scheme(None if path.endswith(kept) else scheme))
        for path, m in block.linears.items()
    }


def run_without_output(skeleton: Skeleton, streams: Streams, plans: Mapping[str, LayerPlan], method: Method) -> Run:
    """A run that packs and writes nothing."""
    nothing = cast(Any, None)
    return Run(skeleton, streams, 0, None, plans, method, Options(), nothing, nothing, nothing)


class Stack(nn.Module):
    """A model with a random embedding (V, D) and blocks that are called with only the hidden state."""

    def __init__(self, *blocks: nn.Module, vocabulary: int = 16, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.embed.weight.data = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(1))
        self.blocks = nn.ModuleList(blocks)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def states_of(stream: Stream) -> list[Tensor]:
    """(…, B, T, D) of each batch, before the next block."""
    return [stream._states.read(batch) for batch in stream.text.batches()]
