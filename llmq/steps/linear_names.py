"""The names of linear layers, in the checkpoint and in the model that transformers builds of it.

The `quantization_config` of config.json contains layer names. Some of its readers use the name in the checkpoint,
others the name in the model, so both are written. Experts that the model holds in one tensor have names in the
checkpoint only.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build import skeleton
from llmq.model.build.checkpoint_names import ModelWeights


@dataclass(frozen=True)
class LinearNames:
    """packed: name -> the packed module of the checkpoint that has this name; plain: names of float layers."""

    packed: dict[str, str]
    plain: tuple[str, ...]
    notes: tuple[str, ...] = ()


def linear_names(checkpoint: Checkpoint, packed: Collection[str], *, remote_code: bool = False) -> LinearNames:
    """The names of all linear layers, of which `packed` are packed; uses only headers and the module tree."""
    try:
        model = skeleton.build(checkpoint.folder, dtype=torch.float32, remote_code=remote_code)
    except (UnsupportedModelError, CheckpointError) as error:
        plain = [module for module in _matrices(checkpoint) if module not in packed]
        note = f"transformers cannot build this model ({error}), so config.json has only the names of the checkpoint"
        return LinearNames({module: module for module in packed}, tuple(dict.fromkeys([*plain, "lm_head"])), (note,))
    weights = ModelWeights(model, checkpoint.tensor, checkpoint.__contains__)
    chosen: dict[str, str] = {}
    plain, known = [], set[str]()
    for path, module in model.named_modules():
        candidates = weights.candidates(path)
        known.update(candidates)
        if not holds_matrix(module):
            continue
        packed_name = next((candidate for candidate in candidates if candidate in packed), None)
        if packed_name is None:
            plain += dict.fromkeys((path, weights.module_name(path)))
        else:
            chosen |= dict.fromkeys((path, packed_name), packed_name)
    chosen |= {module: module for module in packed if module not in chosen}
    plain += [module for module in _matrices(checkpoint) if module not in known and module not in chosen]
    return LinearNames(chosen, tuple(plain))


def holds_matrix(module: nn.Module) -> bool:
    """Whether engines may treat a module as a linear layer; this includes routers, which have special classes."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """The modules with a two-dimensional float weight."""
    names = checkpoint.modules_with("weight")
    infos = {name: checkpoint.info(f"{name}.weight") for name in names}
    return [name for name, info in infos.items() if len(info.shape) == 2 and info.is_float]
