"""Which parameters of a model share a tensor, mostly head and embedding: the tensors of the checkpoint decide.

The class of a model and its config.json name parameters that may be tied. As transformers does on loading, they are
compared with the tensors:

    one of them is stored                     the others are read from its tensor, whichever it is
    several are stored, with equal values     they are tied
    several are stored, with other values     each has its own tensor, although config.json ties them

Full fine-tuning and merging often leave a separate head and a configuration that ties it. Engines follow config.json,
not the tensors: they look for the shared tensor under the name of the embedding, and ignore a head that is tied. So
`settled` gives the checkpoint as transformers would save it, and every command starts from that.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from llmq.checkpoint.reader import Checkpoint
from llmq.model.build.checkpoint_names import ModelWeights

KEY = "tie_word_embeddings"


def settled(checkpoint: Checkpoint, model: Any, packed: Collection[str] = ()) -> Checkpoint:
    """The same checkpoint with one name for each shared tensor, and with a config.json that agrees with the tensors.

    `packed` are the names of packed weights, in the float model. In `model`, which is on meta, parameters with their
    own tensor become separate.
    """
    declared = dict(getattr(model, "all_tied_weights_keys", {}))
    if not declared:
        return checkpoint
    weights = ModelWeights(model, checkpoint.tensor, lambda name: name in packed or name in checkpoint)
    places = {name: checkpoint.location(name) for name in checkpoint.names()}
    separate: list[str] = []
    for source in dict.fromkeys(declared.values()):
        members = [source, *(name for name, other in declared.items() if other == source)]
        stored = {name: own for name in members if (own := weights.stored_name(name)) is not None}
        if not stored:
            continue
        holder = next(iter(stored))
        for name, own in stored.items():
            if name == holder:
                continue
            if {own, stored[holder]} & set(packed) or not _equal(checkpoint, own, stored[holder]):
                separate.append(name)
            elif own != stored[holder]:
                del places[own]
        if holder != source and stored[holder] in places:
            moved, prefix = weights.candidates(source)[-1], f"{model.base_model_prefix}."
            if not any(name.startswith(prefix) for name in places):  # the file leaves it out of all names
                moved = moved.removeprefix(prefix)
            places[moved] = places.pop(stored[holder])
    _separate(model, separate)
    config = checkpoint.config
    if separate and not model.all_tied_weights_keys:
        config = untied_config(config)
    if config is checkpoint.config and places.keys() == set(checkpoint.names()):
        return checkpoint
    return dataclasses.replace(checkpoint, config=config, _tensors=places)


def notes(checkpoint: Checkpoint, settled: Checkpoint) -> tuple[str, ...]:
    """How a checkpoint differs from `settled`, for the user."""
    if settled.config is not checkpoint.config:
        return (
            "config.json ties the head to the embedding, but the checkpoint has another weight for the head, which is "
            f"used, as in transformers; what is written has {KEY} = false, because engines follow config.json",
        )
    missing = [name for name in settled.names() if name not in checkpoint]
    return tuple(f"the shared weight of embedding and head is stored as {name}, as engines expect" for name in missing)


def tie(model: Any) -> None:
    """Give parameters that share a tensor one place in memory, after a model was filled."""
    for name, source in model.all_tied_weights_keys.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._parameters:
            module._parameters[key] = model.get_parameter(source)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head has its own weight."""
    changed = {**config, KEY: False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], KEY: False}
    return changed


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors have the same shape and values; tensors of the same place in a file are the same."""
    if checkpoint.location(name) == checkpoint.location(other):
        return True
    if checkpoint.info(name).shape != checkpoint.info(other).shape:
        return False
    one, two = checkpoint.tensor(name), checkpoint.tensor(other)
    return torch.equal(one, two.to(one.dtype))


def _separate(model: Any, names: Collection[str]) -> None:
    """Give these parameters of a model on meta their own place, and declare them as not tied."""
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        module._parameters[key] = nn.Parameter(torch.empty_like(module._parameters[key]), requires_grad=False)
        del model.all_tied_weights_keys[name]
    if names and not model.all_tied_weights_keys:
        for config in (model.config, model.config.get_text_config()):
            setattr(config, KEY, False)
