"""Whether a checkpoint and its model belong together, tensor by tensor, from headers only.

A tensor that nobody reads is a silent error if it belongs to a part of the model that runs: the scales of an
activation, the bias of a layer that the configuration builds without one, the scale of a weight whose
quantization_config is gone. So every tensor of a module that the model has is used, or the checkpoint is refused.
Tensors of modules that the model does not have, such as heads for multi-token prediction or an image encoder, are left
and listed, also those that transformers drops without a word.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build.checkpoint_names import ModelWeights, require_shape
from llmq.model.build.skeleton import largest_module_list
from llmq.runtime.checkpoint_weights import PackedWeights

COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")  # written by old versions
MASK_DIMENSIONS = 4  # of the causal mask (1, 1, T, T), written by old versions
INCOMPLETE = "check that the checkpoint is complete and that config.json belongs to it"


def require(
    model: nn.Module,
    weights: ModelWeights,
    checkpoint: Checkpoint,
    packed: PackedWeights | None,
    *,
    complete: bool = True,
) -> tuple[str, ...]:
    """Compare the tensors of a checkpoint with the parameters of a model; returns the tensors that the model lacks.

    Raises CheckpointError for a tensor of a part of the model that nobody reads. If the checkpoint must be `complete`,
    also for a parameter of the decoder without a tensor, and for a tensor whose shape is not that of its parameter.
    """
    unread = set(checkpoint.names()).difference(_read(model, weights, packed))
    parts = _Parts(model, weights)
    left, refused = [], {}
    for name in [name for name in checkpoint.names() if name in unread]:
        owner = parts.owner(name)
        if without_effect(name, checkpoint):
            continue
        if owner is None:
            left.append(name)
        elif not parts.ignores(name) and (packed is None or not packed.is_noted(name)):
            refused[name] = owner
    missed = [name for name in left if not parts.ignores(name)]
    if (more := parts.additional_blocks(missed, checkpoint.names())) or refused:
        raise _refusal(checkpoint, refused, more)
    for name, parameter in model.named_parameters() if complete else ():
        if parameter.dim() <= 2 and parts.runs(name) and weights.lacks(name):
            weights.tensor_name(name)  # raises CheckpointError
        if (shape := _stored_shape(name, weights, checkpoint, packed)) is not None:
            require_shape(name, shape, tuple(parameter.shape), _vocabulary_hint(model, name))
    return tuple(left)


def _read(model: nn.Module, weights: ModelWeights, packed: PackedWeights | None) -> Iterator[str]:
    """The tensors of the checkpoint that the parameters and buffers of a model are read from."""
    yield from _files(weights.merged_into, packed)
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        stored = weights.stored_name(name)
        if stored is not None:
            yield from _files([weights.stacked_in.get(stored, stored)], packed)


def _files(names: Iterable[str], packed: PackedWeights | None) -> Iterator[str]:
    for name in names:
        yield from [name] if packed is None else packed.stored_as(name)


def _stored_shape(
    name: str, weights: ModelWeights, checkpoint: Checkpoint, packed: PackedWeights | None
) -> tuple[int, ...] | None:
    """The shape of a parameter in the checkpoint; None if it is read from several tensors, or from a part of one."""
    stored = None if weights.is_borrowed(name) else weights.stored_name(name)
    if stored is None or stored in weights.stacked_in:
        return None
    if packed is not None and packed.is_packed(stored):  # MLX has codes under the name of the weight
        return packed.shape(stored.removesuffix(".weight"))
    if stored in checkpoint:
        return tuple(weights.turned(name, torch.empty(checkpoint.info(stored).shape, device="meta")).shape)
    return None


def _vocabulary_hint(model: Any, name: str) -> str:
    if model.get_parameter(name) is not model.get_input_embeddings().weight:
        return INCOMPLETE
    return "set vocab_size in config.json to the rows of the embedding, or resize the embedding: both must agree"


def without_effect(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor changes nothing: a bias of zeros, or a table that transformers computes itself."""
    info = checkpoint.info(name)
    if COMPUTED.search(name):
        return True
    if name.endswith(".bias"):
        mask = len(info.shape) == MASK_DIMENSIONS and info.shape[2] == info.shape[3]
        return mask or (len(info.shape) == 1 and not bool(checkpoint.tensor(name).count_nonzero()))
    return False


def _refusal(checkpoint: Checkpoint, refused: dict[str, str], more: list[str]) -> CheckpointError:
    if more:
        return CheckpointError(
            f"{checkpoint.folder} holds the block {more[0]} ({len(more)} such blocks), but config.json has fewer "
            "blocks",
            hint="set the number of layers in config.json to that of the checkpoint",
        )
    name, owner = next(iter(refused.items()))
    return CheckpointError(
        f"the model does not use the tensor {name}, although it has the module {owner} ({len(refused)} such tensors): "
        "without it the model would compute something else",
        hint="start from the unquantized model, and check that config.json belongs to these weights and that its "
        "quantization_config, if there was one, is in it",
    )


class _Parts:
    """The modules of a model, by their possible names in a checkpoint."""

    def __init__(self, model: Any, weights: ModelWeights) -> None:
        try:
            self._list, blocks = largest_module_list(model)
        except UnsupportedModelError:  # such a model can be loaded as a whole
            self._list, blocks = "", nn.ModuleList()
        self._count = len(blocks)
        self._lists = list(dict.fromkeys(weights.candidates(self._list))) if self._list else []
        decoder = self._list.rpartition(".")[0]
        around = {self._list[:end] for end, sign in enumerate(self._list) if sign == "."} | {"", self._list}
        self._owners: dict[str, str] = {
            candidate: path
            for path, module in model.named_modules()
            if path not in around and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            for candidate in weights.candidates(path)
        }
        head = model.get_output_embeddings()
        self._running = [f"{path}." for path, module in model.named_modules() if module is head]
        self._running.append(f"{decoder}." if decoder else "")
        ignored = {re.compile(key) for key in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()}
        # A pattern for the additional block of a smaller model may be that of a block of this one.
        own = [name for name, _ in model.named_parameters()]
        self._ignored = [pattern for pattern in ignored if not any(map(pattern.search, own))]

    def ignores(self, name: str) -> bool:
        """Whether transformers lists a tensor among those that the model does not need."""
        return any(pattern.search(name) for pattern in self._ignored)

    def owner(self, name: str) -> str | None:
        """The innermost module of the model that a tensor belongs to; None if the model does not have it."""
        module = name.rpartition(".")[0]
        while module:
            if module in self._owners:
                return self._owners[module]
            module = module.rpartition(".")[0]
        return None

    def runs(self, name: str) -> bool:
        """Whether a parameter belongs to the decoder or to the head; image encoders may be absent."""
        return name.startswith(tuple(self._running))

    def additional_blocks(self, left: Iterable[str], names: Iterable[str]) -> list[str]:
        """Blocks of which every tensor is in `left`, and that have the tensors of a block of the model.

        `names` are all tensors. Blocks for multi-token prediction follow the others in some checkpoints, but have
        additional projections.
        """
        inside: dict[str, set[str]] = {}  # block -> its tensors
        for name in names:
            for path in self._lists:
                number, _, rest = name.removeprefix(f"{path}.").partition(".")
                if name.startswith(f"{path}.") and number.isdecimal():
                    inside.setdefault(f"{path}.{number}", set()).add(rest)
        own = set().union(*(inside.get(f"{path}.{n}", ()) for path in self._lists for n in range(self._count)))
        missed = [block for block in inside if any(name.startswith(f"{block}.") for name in left)]
        return [block for block in missed if inside[block] <= own]
