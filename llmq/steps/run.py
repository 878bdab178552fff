"""`Run`: everything that is the same for all blocks of a run."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq import memory
from llmq.algorithms import Options
from llmq.checkpoint.writer import Writer
from llmq.distributed.ranks import ALONE, Ranks
from llmq.errors import FormatError
from llmq.formats.base import Layout, Reader
from llmq.gguf.imatrix import Importance
from llmq.memory import Economy
from llmq.methods import Method
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Streams, Text
from llmq.numerics.affine_grid import Products, ScaleDtype, dtype_of
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.report.events import OnEvent, ignore
from llmq.steps.fisher_information import FisherInformation


@dataclass(frozen=True)
class Run:
    """Everything that is the same for all blocks of a run.

    streams  the calibration text on its way through the blocks; None for methods without calibration
    seed     of the order in which end-to-end tuning draws the sequences
    fisher   how much errors cost the model's loss; None if no stage needs it
    plans    the plan of each linear layer, by its path in the model; `repair.py` changes those of layers that their
             grid cannot hold
    reader   reads the tensors that `layout` packs
    keep_grid  whether weights that already lie on a grid are stored on it without a second rounding
    ranks    the processes of the run
    economy  what it does to need less memory
    importance  of the inputs of each layer, from an importance matrix; None without one
    """

    skeleton: Skeleton
    streams: Streams | None
    seed: int
    fisher: FisherInformation | None
    plans: dict[str, LayerPlan]
    method: Method
    options: Options
    layout: Layout
    reader: Reader
    writer: Writer
    on_event: OnEvent = ignore
    keep_grid: bool = True
    ranks: Ranks = ALONE
    economy: Economy = Economy.NONE
    importance: Importance | None = None

    def importance_of(self, path: str) -> Tensor | None:
        """How much each input of a layer counts, (K,) float32; None if all count alike."""
        values = None if self.importance is None else self.importance.of(self.plans[path].name)
        return None if values is None else values.to(self.skeleton.device)

    def scales_of(self, paths: Iterable[str]) -> ScaleDtype | None:
        """The values of the scales of layers that share an input, if these are not those of the run.

        One layer for a kernel with fp8 inputs is enough: the layers are quantized together.
        """
        are_products = any(self.plans[path].scheme.scales_are_products for path in paths)
        return Products(dtype_of(self.options.scale_dtype)) if are_products else None

    @functools.cached_property
    def paths(self) -> dict[str, str]:
        """The path of each linear layer in the model, by its name in the checkpoint."""
        return {plan.name: path for path, plan in self.plans.items()}

    def pack(self, path: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of a quantized weight, by their names in the checkpoint."""
        plan = self.plans[path]
        packed = self.layout.pack_layer(quantized, plan.scheme.inputs)
        return {f"{plan.name}.{suffix}": tensor for suffix, tensor in packed.items()}

    def committed(self, index: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """The tensors and the record of a committed block. The first rank reads them for all."""
        if self.ranks.size == 1:
            return self.writer.read(index)
        return self.ranks.first(lambda: _in_memory(*self.writer.read(index)))

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """A committed weight by its name in the checkpoint, from the tensors of its block."""
        reading = self.reader(name)
        if reading is None:
            raise FormatError(
                f"{name} was quantized in the interrupted run, but the current settings keep it in float",
                hint="repeat the original command, or --overwrite to start over",
            )
        grid = self.plans[self.paths[name]].scheme.weights
        if grid is not None and grid.group_size != "tensor":  # it differs from the reader's if the layer was repaired
            same = (
                grid
                if grid.block_type or grid.floats
                else dataclasses.replace(grid, symmetric=reading.scheme.symmetric)
            )
            reading = dataclasses.replace(reading, scheme=same)
        packed = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        return self.layout.unpack(packed, reading)


def streams_of(
    skeleton: Skeleton,
    text: Text,
    calls: RecordedCalls,
    method: Method,
    *,
    folder: Path,
    fisher: FisherInformation | None,
    economy: Economy,
    quantize_head: bool,
    ranks: Ranks,
) -> Streams:
    """The calibration text before the first block; hidden states that do not fit into memory are kept in `folder`."""
    tunes = method.tuning is not None or method.block_tuning is not None
    compares = bool(method.alphas) or tunes
    state = skeleton.hidden_bytes(text.length) * text.sequences
    stored = (1 + compares * (2 if method.transforms else 1)) * state  # a transform keeps inputs and outputs
    storage = Storage.choose(stored, skeleton.device, folder, economy)
    # Sequence by sequence, which neither experts nor layers with another order of tokens can be.
    sums_by_units = not any(block.experts or block.layout.tokens_first for block in skeleton.blocks)
    if economy and sums_by_units:
        text = dataclasses.replace(text, in_parts=True)
    return Streams(
        quantized=Stream(skeleton, text, calls, storage, "quantized", to_the_end=quantize_head),
        floats=Stream(skeleton, text, calls, storage, "float", to_the_end=tunes) if compares else None,
        token_weights=fisher.token_weights if fisher is not None and method.token_weights else None,
        tokens_per_input=method.expert_tokens,
        memory=0 if economy else memory.spare(skeleton.device) - storage.takes_device_memory * stored,
        ranks=ranks,
    )


def _in_memory(tensors: Mapping[str, Tensor], record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return dict(tensors.items()), record
