"""A skeleton from a configuration alone: no checkpoint is needed to estimate the cost of a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.model.build import module_tree
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import separate


def skeleton_of(config: Any, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Skeleton:
    """The skeleton of a model that has no weights; blocks compute in `dtype` on `device`.

    config  a configuration of transformers, or a folder with a config.json

    Raises UnsupportedModelError if the model cannot be built.
    """
    if isinstance(config, str | Path):
        config = module_tree.load_config(Path(config), remote_code=False)
    model = module_tree.from_config(config, dtype=dtype, remote_code=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = shapes.keys() - dict(getattr(model, "all_tied_weights_keys", {})).keys()
    weights = ModelWeights(model, _no_weights, stored.__contains__)
    separate(model, weights, (), lambda module: shapes[f"{module}.weight"], lambda name, _: _no_weights(name))
    return Skeleton(model, weights, torch.device(device))


def _no_weights(name: str) -> Tensor:
    raise CheckpointError(f"{name} cannot be read: the model was built from its configuration alone")
