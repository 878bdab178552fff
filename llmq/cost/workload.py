"""What a run will do: the outline of the model, the stages of the method, the text and the grid of each layer."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmq import algorithms, memory
from llmq.config import QuantConfig
from llmq.cost.outline import BlockOutline, Layer, Outline
from llmq.cost.work import Kind, Work
from llmq.methods import Method
from llmq.model.passes import short_products
from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Workload:
    """One run.

    grids         the grid of each linear layer by its path; None or absent: kept in float
    stored        bytes per element of the checkpoint
    device        "cpu" or "cuda"
    ranks         number of processes with a device each
    repeats       whether forwards start again for each group, because their activations do not fit into memory
    at_head       whether this is the work on the head only, whose inputs in the float model are not known
    """

    outline: Outline
    method: Method
    settings: QuantConfig
    grids: Mapping[str, WeightScheme | None]
    stored: int
    device: str = "cpu"
    ranks: int = 1
    repeats: bool = False
    at_head: bool = False

    @property
    def length(self) -> int:
        return self.outline.length

    @property
    def given(self) -> int:
        """Sequences of the calibration text (as `RunText.load`)."""
        return self.method.read_of(self.settings.calibration.samples)

    @property
    def written(self) -> int:
        """Sequences that the model generates in addition."""
        return self.method.written * self.given

    @property
    def sequences(self) -> int:
        return self.given + self.written

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def validation(self) -> int:
        """Sequences on which nothing is fitted (as `RunText.complete`)."""
        share = math.ceil(self.method.validation * self.given)
        return min(max(share, self.method.tuning is not None), self.given - 1)

    @property
    def measured(self) -> int:
        """Sequences on which the finished model is compared with the original; without text there are none."""
        text = self.method.needs_calibration or self.settings.calibration.sources
        return self.settings.calibration.held_back if text else 0

    @property
    def fitted(self) -> int:
        return self.sequences - self.validation

    @property
    def batch(self) -> int:
        """Sequences that run together."""
        return max(1, memory.TOKENS_PER_BATCH_TO_QUANTIZE.get(self.device, 4096) // self.length)

    @property
    def compares(self) -> bool:
        """Whether there is a second stream, with the hidden states of the float model."""
        method = self.method
        tunes = method.block_tuning is not None or method.tuning is not None
        return (bool(method.alphas) or tunes) and not self.at_head

    @property
    def streams(self) -> int:
        return 1 + self.compares

    @property
    def judges(self) -> bool:
        """Whether results are compared by their loss on validation tokens."""
        return self.validation > 0 and bool(self.method.alphas or self.method.refinements)

    @property
    def factors(self) -> bool:
        """Whether Hessians are factored."""
        method = self.method
        needed = algorithms.rounding(method.rounding).NEEDS_FACTOR
        return method.needs_calibration and (bool(method.alphas) or bool(method.refinements) or needed)

    @property
    def forward_kind(self) -> Kind:
        """The kind of the products in forwards."""
        return Kind.HALF if self.outline.itemsize == 2 else Kind.FLOAT32

    @property
    def gradient_kind(self) -> Kind:
        """The kind of the products in forwards with a graph, and in the backward pass (`short_products.py`)."""
        return Kind.HALF if self.device == "cpu" and short_products.is_fast() else self.forward_kind

    @property
    def gram_kind(self) -> Kind:
        """The kind of the products of inputs: float32 unless inputs are in half precision on a GPU."""
        return Kind.HALF if self.device == "cuda" and self.outline.itemsize == 2 else Kind.FLOAT32

    def grid(self, path: str, layer: Layer) -> WeightScheme | None:
        """The grid of a layer of the block at `path`."""
        return self.grids.get(f"{path}.{layer.name}")

    @property
    def packed_weights(self) -> int:
        """The number of packed weights of all blocks."""
        return sum(block.packed_weights * number for block, number in self.blocks())

    def blocks(self) -> Iterator[tuple["PlannedBlock", int]]:
        """Each kind of block, and how many there are."""
        pairs = zip(self.outline.paths, self.outline.blocks, strict=True)
        planned = (
            PlannedBlock(outline, tuple(self.grid(path, layer) for layer in outline.layers)) for path, outline in pairs
        )
        yield from Counter(planned).items()


@dataclass(frozen=True)
class Group:
    """Layers that share an input of `in_features` columns; `rows` per packed layer; `share` of the tokens arrives."""

    in_features: int
    rows: tuple[int, ...]
    grids: tuple[WeightScheme, ...]
    share: float

    @property
    def weights(self) -> int:
        return self.in_features * sum(self.rows)


@dataclass(frozen=True)
class PlannedBlock:
    """A kind of block, and the grid of each of its layers; None: the layer is kept in float."""

    outline: BlockOutline
    grids: tuple[WeightScheme | None, ...]

    @property
    def groups(self) -> list[Group]:
        """The groups in order; a group whose layers are all kept in float has no rows."""
        groups = []
        for numbers in self.outline.groups:
            layers = [self.outline.layers[number] for number in numbers]
            packed = [(self.outline.layers[n].out_features, grid) for n in numbers if (grid := self.grids[n])]
            rows, grids = tuple(N for N, _ in packed), tuple(grid for _, grid in packed)
            groups.append(Group(layers[0].in_features, rows, grids, layers[0].share))
        return groups

    @property
    def packed_weights(self) -> int:
        layers = zip(self.outline.layers, self.grids, strict=True)
        return sum(layer.weights for layer, grid in layers if grid is not None)

    @property
    def scales(self) -> int:
        """The number of scales of all packed layers."""
        return sum(
            layer.out_features * -(-layer.in_features // grid.columns_per_group(layer.in_features))
            for layer, grid in zip(self.outline.layers, self.grids, strict=True)
            if grid is not None
        )


def products(kind: Kind, flops: float) -> Work:
    """Matrix products of one kind."""
    return Work.of(kind, flops)


def elementwise(nbytes: float, calls: float = 0.0) -> Work:
    """Operations that are not products: bytes read and written, and the number of operations."""
    return Work({Kind.MOVED: nbytes, Kind.CALLS: calls})
