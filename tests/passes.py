"""Text on its way through a skeleton, set up as a job does it."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq.algorithms import Options
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

REMEMBERED, REPEATED = 1 << 40, 0  # bytes of memory for what forwards keep
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
    """The sequences `ids` (S, T) in front of the first block."""
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
) -> Streams:
    """The same as the pipeline has it, with the float stream next to it if `floats`."""
    text, calls = Text(ids, batch, validation), RecordedCalls(skeleton)
    return Streams(
        quantized=Stream(skeleton, text, calls, storage, "quantized"),
        floats=Stream(skeleton, text, calls, storage, "float") if floats else None,
        token_weights=weights,
        tokens_per_input=tokens_per_input,
        memory=memory,
    )


def halve(block: Block, group: InputGroup) -> None:
    """Stands for quantization: what comes later in the block has to see it."""
    for path in group.names:
        block.set_weight(path, block.weight(path) * 0.5)


def run_block(
    streams: Streams,
    block: Block,
    quantize: Callable[[Block, InputGroup], None] = halve,
    *,
    at_once: int | None = None,
) -> dict[str, InputStats]:
    """Take the streams past a block as the pipeline does; returns the statistics by the first layer of each group.

    quantize  is called for each group when its statistics are there
    at_once   of how many groups statistics are summed in one pass; by default as many as fit
    """
    block.load()
    streams.enter(block)
    groups = input_groups(block, streams.quantized.sample(streams.text.length))
    seen: dict[str, InputStats] = {}

    def note(group: InputGroup, stats: InputStats) -> None:
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
    """Every linear layer of a block on one grid, but for those whose path ends in `kept`, which stay in float."""
    return {
        path: LayerPlan(path, m.out_features, m.in_features, Scheme(None if path.endswith(kept) else scheme))
        for path, m in block.linears.items()
    }


def run_without_output(skeleton: Skeleton, streams: Streams, plans: Mapping[str, LayerPlan], method: Method) -> Run:
    """A run of which nothing is packed or written."""
    nothing = cast(Any, None)
    return Run(skeleton, streams, None, plans, method, Options(), nothing, nothing, nothing)


class Stack(nn.Module):
    """A model of an embedding (V, D) of random numbers and some blocks, which are called with a hidden state alone."""

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
    """(…, B, T, D) of each batch, in front of the next block."""
    return [stream._states.read(batch) for batch in stream.text.batches()]
