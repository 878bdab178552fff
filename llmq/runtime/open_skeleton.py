"""Open a checkpoint, float or packed, as a model whose blocks are read one at a time, in float.

Blocks of a packed checkpoint are dequantized when they are read, so a model larger than memory can be evaluated or
tuned block by block. `load.py` loads complete models that run packed.
"""

from collections.abc import Iterable
from functools import partial

import torch

from llmq.checkpoint.read_ahead import ReadAhead
from llmq.checkpoint.reader import Checkpoint
from llmq.model.build import module_tree
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.merged_tensors import merge
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import separate
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings, shape_of


def open_skeleton(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, remote_code: bool = False
) -> Skeleton:
    """Open a model whose blocks compute in `dtype` on `device`; packed weights are dequantized when they are read.

    Raises UnsupportedModelError if transformers or llmq cannot build it, FormatError for an unknown packing.
    """
    model = module_tree.build(checkpoint.folder, dtype=dtype, remote_code=remote_code)
    floats = checkpoint.modules_with("weight")
    if quantization_settings(checkpoint) is None:
        read = ReadAhead(checkpoint.tensor, lambda name: checkpoint.info(name).nbytes, pin=device.type == "cuda")

        def expect(names: Iterable[str]) -> None:
            read.expect([name for name in names if name in checkpoint])  # slices of stacked tensors are read one by one

        weights = ModelWeights(model, read, checkpoint.__contains__, expect=expect)
        separate(model, weights, floats, partial(shape_of, checkpoint, None), checkpoint.member)
        merge(model, weights, checkpoint.names())
        return Skeleton(model, weights, device)
    packed = PackedWeights(checkpoint)
    names = frozenset(packed.weight_names())
    weights = ModelWeights(model, packed.tensor, packed.__contains__, names, quantized=names.__contains__)
    modules = dict.fromkeys([*packed.modules, *floats])
    separate(model, weights, modules, partial(shape_of, checkpoint, packed), packed.member)
    merge(model, weights, checkpoint.names())
    return Skeleton(model, weights, device)


def stored_bytes(skeleton: Skeleton, checkpoint: Checkpoint, name: str) -> int:
    """The size of a tensor in a float checkpoint, which may hold it as a part of a stacked tensor."""
    stacked = skeleton.weights.stacked_in
    if name not in stacked:
        return checkpoint.info(name).nbytes
    sharing = skeleton.weights.parts_of(stacked[name])
    return checkpoint.info(stacked[name]).nbytes // sharing
