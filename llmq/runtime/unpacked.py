"""A checkpoint, float or packed, as a model whose blocks are read one at a time, in float.

What a block of a packed checkpoint computes is what its file says, dequantized: so a model that is larger than memory
can be evaluated, or tuned, block by block.  `load.py` is for models that run packed, as a whole.
"""

import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.model import skeleton
from llmq.model.skeleton import Skeleton
from llmq.model.weights import ModelWeights
from llmq.runtime.load import PackedWeights, quantization_settings


def open_skeleton(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, remote_code: bool = False
) -> Skeleton:
    """The model of a checkpoint, its blocks computing in `dtype` on `device`; packed weights are dequantized when read.

    Raises UnsupportedModelError where transformers or llmq cannot build it, FormatError for an unknown packing.
    """
    model = skeleton.build(checkpoint.folder, dtype=dtype, remote_code=remote_code)
    if quantization_settings(checkpoint) is None:
        return Skeleton(model, ModelWeights(model, checkpoint.tensor, checkpoint.__contains__), device)
    packed = PackedWeights(checkpoint)
    modules = {f"{module}.weight": module for module in packed.modules}

    def read(name: str) -> Tensor:
        return packed.read(modules[name]).dequantize() if name in modules else checkpoint.tensor(name)

    weights = ModelWeights(model, read, lambda name: name in modules or name in checkpoint)
    return Skeleton(model, weights, device)
