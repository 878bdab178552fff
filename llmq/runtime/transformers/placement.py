"""Replace modules of a model that transformers loads: stored layers before loading, packed layers after."""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from llmq.errors import FormatError
from llmq.model.build.block import is_plain_linear
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.experts.stacking import all_packed, find_stackings, stackings_of
from llmq.runtime.checkpoint_weights import shape_of
from llmq.runtime.packed_linear import PackedRows
from llmq.runtime.transformers.stored_experts import StoredExperts
from llmq.runtime.transformers.stored_linear import Source, StoredLinear


def place_stored(model: nn.Module, source: Source) -> None:
    """Replace layers with packed weights by modules, on meta, that hold the tensors of the checkpoint.

    Raises FormatError if a packed weight has no layer.
    """
    weights = ModelWeights(model, source.checkpoint.tensor, source.checkpoint.__contains__)
    waiting = set(source.modules)
    modules = dict.fromkeys([*source.files.modules, *source.checkpoint.modules_with("weight")])
    stackings = find_stackings(model, weights, modules, partial(shape_of, source.checkpoint, source.files))
    place_of = names_in_model(model)
    for path, module in list(model.named_modules()):
        name = next((candidate for candidate in weights.candidates(path) if candidate in waiting), None)
        if name is not None and _is_linear(module):
            bias, dtype = module.bias is not None, module.weight.dtype
            model.set_submodule(path, StoredLinear(source, name, bias=bias, dtype=dtype))
            waiting.discard(name)
        elif (own := stackings_of(path, module, stackings)) and all_packed(path, own, waiting):
            model.set_submodule(path, StoredExperts(module, own, source, partial(_below, path, place_of)))
            waiting.difference_update(*(stacking.modules() for stacking in own))
    _require_none_left(model, waiting)


def cast_as_planned(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast loaded parameters to the dtypes they had on meta, or to the dtypes that the model requires."""
    plan = model._get_dtype_plan(model.dtype)
    for name, parameter in model.named_parameters():
        required = next(
            (dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", r"\d+"), name)), None
        )
        expected = required or dtypes.get(name, parameter.dtype)
        if parameter.is_floating_point() and parameter.dtype != expected and not parameter.is_meta:
            parameter.data = parameter.data.to(expected)


def run_packed(model: nn.Module) -> list[str]:
    """Replace loaded modules by packed layers; returns the paths of the modules that cannot be replaced.

    Loaded tensors are freed as soon as their module is packed: only one module at a time is in memory twice.
    """
    experts = [path for path, module in model.named_modules() if isinstance(module, StoredExperts)]
    inside = tuple(f"{path}." for path in experts)
    stored = (path for path, module in model.named_modules() if isinstance(module, StoredLinear))
    linears = [path for path in stored if not path.startswith(inside)]
    left = [path for path in (*linears, *experts) if not _run_packed_at(model, path)]
    for rows in model.modules():
        if isinstance(rows, PackedRows):
            rows.prepare()
    return left


def _run_packed_at(model: nn.Module, path: str) -> bool:
    """Replace one module, and return whether this was possible; a function, so that loaded tensors are freed."""
    module = model.get_submodule(path)
    if not isinstance(module, StoredLinear | StoredExperts):
        raise TypeError(f"{path} is a {type(module).__name__}, expected a StoredLinear or StoredExperts")
    packed = module.packed()
    if packed is None:
        _keep_dtypes(module)
        return False
    _replace(model, path, module, packed)
    return True


def _keep_dtypes(module: nn.Module) -> None:
    """Read offloaded tensors in their stored dtypes: older versions of transformers cast all to the model dtype."""
    for layer in module.modules():
        offloaded = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
        index = getattr(getattr(offloaded, "dataset", None), "index", None)
        if isinstance(layer, StoredLinear) and offloaded is not None and index is not None:
            for name, parameter in layer.named_parameters():
                entry = index.get(f"{offloaded.prefix}{name}")
                if entry is not None and "dtype" in entry:
                    entry["dtype"] = str(parameter.dtype).removeprefix("torch.")


def names_in_model(model: Any) -> Callable[[str], str]:
    """Return a function from the name of a module in the checkpoint to its name in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

    def place(name: str) -> str:
        renamed: str = rename_source_key(f"{name}.packed", renamings, [])[0]
        return renamed.removesuffix(".packed")

    return place


def _below(path: str, place_of: Callable[[str], str], name: str) -> str:
    """The place, relative to the experts at `path`, where transformers expects a module of the checkpoint."""
    place = place_of(name)
    for candidate in (place, *(f"{path.partition('.')[0]}.{place}", place.partition(".")[2])):
        if candidate.startswith(f"{path}."):
            return candidate.removeprefix(f"{path}.")
    raise FormatError(f"{name} belongs to the experts at {path}, but transformers expects it at {place}")


def _replace(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another, and keep the hooks of accelerate."""
    new.train(old.training)
    hook = getattr(old, "_hf_hook", None)
    model.set_submodule(path, new)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    used = set(new.modules())
    for part in old.modules():  # references from a hooked module to itself, which would keep its tensors alive
        if part not in used:
            part.__dict__.pop("forward", None)
            part.__dict__.pop("_old_forward", None)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or is_plain_linear(module)


def _require_none_left(model: Any, waiting: Collection[str]) -> None:
    """Raise FormatError for packed weights without a layer, except those that transformers ignores."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    lost = sorted(name for name in waiting if not any(pattern.search(f"{name}.weight") for pattern in ignored))
    if lost:
        raise FormatError(f"the model has no linear layer for {lost[0]} ({len(lost)} packed weights in total)")
