"""Bytes of files: the quantized model, and what a run reads and writes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from llmq.cost.passes import VALIDATIONS
from llmq.cost.work import Kind, Work
from llmq.cost.workload import PlannedBlock, Workload
from llmq.formats.base import Layout
from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

ROWS = 64  # of a small weight that is packed to learn the size of a large one


@dataclass(frozen=True)
class Sizes:
    """Bytes of the quantized model.

    packed   of the packed layers, and `floats` of all other tensors, per kind of block
    head     of the packed head; 0 if it is kept in float
    outside  of all other tensors outside of the blocks
    blocks   the number of blocks of each kind
    """

    packed: Mapping[PlannedBlock, int]
    floats: Mapping[PlannedBlock, int]
    head: int
    outside: int
    blocks: Mapping[PlannedBlock, int]

    @property
    def staged(self) -> int:
        """Bytes of all committed blocks."""
        return self.head + sum((self.packed[block] + self.floats[block]) * n for block, n in self.blocks.items())

    @property
    def model(self) -> int:
        """Bytes of all tensors of the quantized model."""
        return self.staged + self.outside


def packed_bytes(layout: Layout, N: int, K: int, grid: WeightScheme, scale_dtype: torch.dtype) -> int:
    """Bytes of the tensors of a packed weight (N, K).

    Every tensor is constant or grows in proportion to N, so two small weights with K columns are packed.
    """
    if grid.block_type is not None:
        kind = BLOCK_TYPES[grid.block_type]
        return N * K // kind.columns * kind.nbytes
    few = max(ROWS, grid.rows_per_scale)
    if N <= 2 * few:
        return _packed(layout, N, K, grid, scale_dtype)
    small, twice = (_packed(layout, rows, K, grid, scale_dtype) for rows in (few, 2 * few))
    return small + (twice - small) * (N - few) // few


def packed_layers(layers: Iterable[LayerPlan], layout: Layout, model_dtype: torch.dtype) -> int:
    """Bytes of the tensors of all packed layers; layers that stay in float are not counted."""
    dtype, known = layout.scale_dtype(model_dtype), dict[tuple[int, int, WeightScheme], int]()
    total = 0
    for layer in layers:
        grid = layer.scheme.weights
        if grid is not None:
            key = layer.out_features, layer.in_features, grid
            if key not in known:
                known[key] = packed_bytes(layout, *key, dtype)
            total += known[key]
    return total


def _packed(layout: Layout, N: int, K: int, grid: WeightScheme, scale_dtype: torch.dtype) -> int:
    weight = QuantizedTensor.blank(N, K, grid, scale_dtype)
    return sum(tensor.nbytes for tensor in layout.pack(weight).values())


def sizes(work: Workload, layout: Layout, scale_dtype: torch.dtype, head: WeightScheme | None) -> Sizes:
    """The sizes of the model that a run writes; `head` is the grid of the head, or None."""
    outline, known = work.outline, dict[tuple[int, int, WeightScheme], int]()

    def packed(N: int, K: int, grid: WeightScheme) -> int:
        if (N, K, grid) not in known:
            known[N, K, grid] = packed_bytes(layout, N, K, grid, scale_dtype)
        return known[N, K, grid]

    blocks = dict(work.blocks())
    head_bytes = 0 if head is None else packed(outline.vocabulary, outline.width, head)
    replaced = outline.vocabulary * outline.width if head is not None and not outline.tied else 0
    return Sizes(
        packed={
            block: sum(
                packed(x.out_features, x.in_features, grid)
                for x, grid in zip(block.outline.layers, block.grids, strict=True)
                if grid is not None
            )
            for block in blocks
        },
        floats={block: (block.outline.parameters - block.packed_weights) * work.stored for block in blocks},
        head=head_bytes,
        outside=(outline.outside - replaced) * work.stored,
        blocks=blocks,
    )


def transfers(work: Workload, files: Sizes, *, packed_in_memory: bool) -> Work:
    """What a run reads and writes, without state that does not fit into memory.

    packed_in_memory  whether end-to-end tuning keeps the packed blocks in memory
    """
    weights = sum(block.outline.parameters * n for block, n in files.blocks.items()) * work.stored
    tuning = work.method.tuning
    starts = tuning is not None and tuning.rounding > 0  # from the place of float weights between quantized values
    passes = 2 + (work.written > 0) + 2 * work.method.needs_fisher + starts
    outside = work.outline.outside * work.stored
    read = weights * passes + 3 * outside + files.staged + files.model
    written = files.staged + files.model
    if tuning is not None:
        runs = 2 + VALIDATIONS + 3 * tuning.steps  # a step runs each block twice, and then updates it
        read += (2 if packed_in_memory else runs) * files.staged
        written += files.staged
    return Work({Kind.READ: float(read), Kind.WRITTEN: float(written)})
