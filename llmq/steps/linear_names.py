"""What the linear layers of a checkpoint are called: on the disk, and in the model that transformers makes of it.

The block `quantization_config` of config.json names layers, and its readers look for one name or the other, so both are
given.  Experts that the model holds in one tensor have names on the disk alone.
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
    """packed: name -> the packed module of the checkpoint that it stands for; plain: names of layers that are not."""

    packed: dict[str, str]
    plain: tuple[str, ...]
    notes: tuple[str, ...] = ()


def linear_names(checkpoint: Checkpoint, packed: Collection[str], *, remote_code: bool = False) -> LinearNames:
    """The names of all linear layers, of which `packed` are packed; from headers and the module tree alone."""
    try:
        model = skeleton.build(checkpoint.folder, dtype=torch.float32, remote_code=remote_code)
    except (UnsupportedModelError, CheckpointError) as error:
        plain = [module for module in _matrices(checkpoint) if module not in packed]
        note = f"transformers does not build this model ({error}), so layers are known by their names on the disk alone"
        return LinearNames({module: module for module in packed}, tuple(dict.fromkeys([*plain, "lm_head"])), (note,))
    weights = ModelWeights(model, checkpoint.tensor, checkpoint.__contains__)
    chosen: dict[str, str] = {}
    plain, known = [], set[str]()
    for path, module in model.named_modules():
        candidates = weights.candidates(path)
        known.update(candidates)
        if not holds_matrix(module):
            continue
        own = next((candidate for candidate in candidates if candidate in packed), None)
        if own is None:
            plain += dict.fromkeys((path, weights.module_name(path)))
        else:
            chosen |= dict.fromkeys((path, own), own)
    chosen |= {module: module for module in packed if module not in chosen}
    plain += [module for module in _matrices(checkpoint) if module not in known and module not in chosen]
    return LinearNames(chosen, tuple(plain))


def holds_matrix(module: nn.Module) -> bool:
    """Whether engines may take it for a linear layer: routers, which transformers has classes of their own for, too."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """The modules that hold a float weight of two dimensions."""
    names = checkpoint.modules_with("weight")
    infos = {name: checkpoint.info(f"{name}.weight") for name in names}
    return [name for name, info in infos.items() if len(info.shape) == 2 and info.dtype.is_floating_point]
