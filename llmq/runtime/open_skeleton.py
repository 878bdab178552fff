"""Open a checkpoint, float or packed, as a model whose blocks are read one at a time, in float.

Blocks of a packed checkpoint are dequantized when they are read, so a model larger than memory can be evaluated or
tuned block by block. `load.py` loads complete models that run packed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from llmq.checkpoint.read_ahead import ReadAhead
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import UnsupportedModelError
from llmq.model.build import module_tree, ties
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.merged_tensors import merge
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import separate
from llmq.numerics.scheme import InputScheme
from llmq.runtime import whole_model
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings, shape_of


@dataclass(frozen=True)
class Opened:
    """A model on meta, and where its tensors are.

    checkpoint  as `ties.settled` returns it
    packed      its packed weights; None for a float checkpoint
    left        its tensors that belong to no module of the model
    notes       how its tensors differ from config.json
    """

    model: nn.Module
    checkpoint: Checkpoint
    weights: ModelWeights
    packed: PackedWeights | None
    left: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """`notes`, and a note on `left`, for the user."""
        left = self.left
        more = (f"{len(left)} tensors belong to no module of the model, such as {left[0]}",) if left else ()
        return (*self.notes, *more)


def open_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    remote_code: bool = False,
    pin: bool = False,
    complete: bool = True,
) -> Opened:
    """Build the model of a checkpoint on meta, and find its tensors, from headers; `pin` is for a GPU.

    `complete` is whether every parameter of the decoder must have a tensor of its shape.

    Raises UnsupportedModelError if transformers or llmq cannot build it, FormatError for an unknown packing, and the
    errors of `whole_model.require`.
    """
    if complete:
        module_tree.require_tensors_for_layers(checkpoint.folder, len(checkpoint.names()))
    model = module_tree.build(checkpoint.folder, dtype=dtype, remote_code=remote_code)
    packed = None if quantization_settings(checkpoint) is None else PackedWeights(checkpoint)
    names = frozenset() if packed is None else frozenset(packed.weight_names())
    settled = ties.settled(checkpoint, model, names)
    if packed is not None:
        packed = packed if settled is checkpoint else PackedWeights(settled)
        weights = ModelWeights(model, packed.tensor, packed.__contains__, names, quantized=names.__contains__)
    else:
        read = ReadAhead(settled.tensor, lambda name: settled.info(name).nbytes, pin=pin)

        def expect(names: Iterable[str]) -> None:
            read.expect([name for name in names if name in settled])  # slices of stacked tensors are read one by one

        weights = ModelWeights(model, read, settled.__contains__, expect=expect)
    floats = settled.modules_with("weight")
    modules = floats if packed is None else list(dict.fromkeys([*packed.modules, *floats]))
    member = settled.member if packed is None else packed.member
    separate(model, weights, modules, partial(shape_of, settled, packed), member, settled.names())
    merge(model, weights, settled.names())
    left = whole_model.require(model, weights, settled, packed, complete=complete)
    return Opened(model, settled, weights, packed, left, ties.notes(checkpoint, settled))


@dataclass(frozen=True)
class Compared:
    """A checkpoint after the comparison with its model: see `Opened` for the fields."""

    checkpoint: Checkpoint
    left: tuple[str, ...]
    notes: tuple[str, ...]


def compared(checkpoint: Checkpoint, *, remote_code: bool = False, complete: bool = True) -> Compared:
    """Compare the tensors of a checkpoint with its model, for commands that need no model.

    `complete` is false for commands that also take a part of a model.

    If transformers cannot build the model, only the names and suffixes of packed weights are compared, and a note
    reports this. Raises CheckpointError and FormatError.
    """
    try:
        opened = open_model(checkpoint, torch.float32, remote_code=remote_code, complete=complete)
    except UnsupportedModelError as error:
        return Compared(checkpoint, (), (f"it is unknown whether every tensor is used: {error}",))
    return Compared(opened.checkpoint, opened.left, opened.remarks)


def open_skeleton(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, remote_code: bool = False
) -> Skeleton:
    """Open a model whose blocks compute in `dtype` on `device`; packed weights are dequantized when they are read.

    The inputs of its layers are quantized as the checkpoint declares. Raises the errors of `open_model`.
    """
    opened = open_model(checkpoint, dtype, remote_code=remote_code, pin=device.type == "cuda")
    skeleton = Skeleton(opened.model, opened.weights, device)
    if opened.packed is not None:
        skeleton.quantize_inputs(declared_inputs(skeleton, opened.packed))
    return skeleton


def declared_inputs(skeleton: Skeleton, packed: PackedWeights) -> dict[str, InputScheme]:
    """How the inputs of linear layers in the blocks are quantized, by path; layers with float inputs are left out."""
    name, modules = skeleton.weights.module_name, frozenset(packed.modules)
    linears = ((path, name(path)) for block in skeleton.blocks for path in block.linears)
    schemes = ((path, packed.inputs(module)) for path, module in linears if module in modules)
    return {path: inputs for path, inputs in schemes if inputs is not None}


def stored_bytes(skeleton: Skeleton, checkpoint: Checkpoint, name: str) -> int:
    """The size of a tensor in a float checkpoint, which may hold it as a part of a stacked tensor."""
    stacked = skeleton.weights.stacked_in
    if name not in stacked:
        return checkpoint.info(name).nbytes
    sharing = skeleton.weights.parts_of(stacked[name])
    return checkpoint.info(stacked[name]).nbytes // sharing
