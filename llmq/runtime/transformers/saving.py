"""The tensors of a packed model in the format of its checkpoint, for `save_pretrained`.

The model in memory is saved, in the format of the files from which it was loaded. If a layer is unchanged, the tensors
of the files are used, so that files of other tools are reproduced exactly. Otherwise, or if the files are gone, the
layer is packed again and checked by reading it back.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import CheckpointError, FormatError
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.experts.stacking import Stacking
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.runtime.fused_linear import FusedLinear
from llmq.runtime.packed_experts import PackedExperts
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.transformers.placement import names_in_model
from llmq.runtime.transformers.stored_linear import Source

logger = logging.getLogger(__name__)

Layer = PackedLinear | FusedLinear
Packed = PackedLinear | FusedLinear | PackedExperts


def stored_state(model: nn.Module, source: Source) -> dict[str, Tensor]:
    """The state of the model by name, with packed layers in the format of the checkpoint, on the CPU.

    Raises FormatError for a layer that is not from `source`, or that cannot be written in its format.
    """
    weights = ModelWeights(model, source.checkpoint.tensor, source.checkpoint.__contains__)
    place_of = names_in_model(model)
    packed = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Packed) or (isinstance(module, nn.Linear) and _stored_as(path, weights, source))
    }
    inside = tuple(f"{path}." for path in packed)
    floats = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    state: dict[str, Tensor] = {}
    for path, module in packed.items():
        if isinstance(module, PackedExperts):
            own, biases = _of_experts(path, module, place_of, source)
        else:
            own, biases = _of_layer(path, module, weights, source)
        state |= own
        floats |= biases
    _require_all(model, {place_of(name) for name in source.modules}, {*state, *floats})
    return _as_stored(floats, weights, source) | state


def _as_stored(floats: Mapping[str, Tensor], weights: ModelWeights, source: Source) -> dict[str, Tensor]:
    """Tensors in the shapes of the files, and in their dtypes if the values stay the same; tied tensors stay tied."""
    turned = {name: weights.turned(name, tensor) for name, tensor in floats.items()}
    cast: dict[int, Tensor] = {}  # by the address of a tensor
    for name, tensor in turned.items():
        stored = weights.stored_name(name)
        if stored is not None and not tensor.is_meta and tensor.numel():
            converted = _cast(tensor, stored, source)
            if converted is not None:
                cast[tensor.data_ptr()] = converted
    return {name: cast.get(tensor.data_ptr(), tensor) for name, tensor in turned.items()}


def _cast(tensor: Tensor, stored: str, source: Source) -> Tensor | None:
    """The tensor in the dtype of the checkpoint, if it differs and loading changed no value."""
    dtype = source.checkpoint.info(stored).dtype
    if dtype == tensor.dtype:
        return None
    cast = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize:
        return cast if torch.equal(cast.to(tensor.dtype), tensor) else None
    try:
        return cast if torch.equal(cast.cpu(), source.checkpoint.tensor(stored)) else None
    except CheckpointError as error:
        logger.warning("%s is saved as %s, the dtype that it was loaded in: %s", stored, tensor.dtype, error)
        return None


def _stored_as(path: str, weights: ModelWeights, source: Source) -> str | None:
    """The name of a packed module in the checkpoint."""
    return next((candidate for candidate in weights.candidates(path) if candidate in source.modules), None)


def _of_layer(
    path: str, layer: nn.Linear, weights: ModelWeights, source: Source
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a layer and its bias, by their names in the model."""
    name = _stored_as(path, weights, source)
    if name is None:
        raise FormatError(
            f"{path} is packed, but {source.checkpoint.folder} has no such layer",
            hint="save adapters separately, and load this model again from its folder",
        )
    own = tensors_of(name, layer.quantized(), source) if isinstance(layer, Layer) else _unchanged(name, layer, source)
    tensors = {f"{path}.{suffix}": tensor for suffix, tensor in own.items()}
    return tensors, {} if layer.bias is None else {f"{path}.bias": layer.bias.detach().clone()}


def _unchanged(name: str, layer: nn.Linear, source: Source) -> dict[str, Tensor]:
    """The tensors of a weight that was dequantized during loading and is unchanged."""
    weight = layer.weight.detach().cpu()
    if not torch.equal(source.files.weight(name).to(weight.dtype), weight):
        raise FormatError(f"{name} was dequantized and changed; llmq cannot pack it again")
    return {suffix: source.checkpoint.tensor(f"{name}.{suffix}") for suffix in source.suffixes(name)}


def _require_all(model: Any, places: Collection[str], state: Collection[str]) -> None:
    """Raise FormatError for packed weights that the model holds as floats under other names."""
    written = {name.rpartition(".")[0] for name in state}
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    lost = sorted(
        place
        for place in places
        if not written & {place, prefix + place, place.removeprefix(prefix)}
        and not any(pattern.search(f"{place}.weight") for pattern in ignored)
    )
    if lost:
        raise FormatError(
            f"{lost[0]} was dequantized during loading ({len(lost)} such weights), so it cannot be saved packed",
            hint="copy the folder, or load with llmq.enable_transformers() and from_pretrained, which keep the tensors",
        )


def _of_experts(
    path: str, experts: PackedExperts, place_of: Callable[[str], str], source: Source
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the weights of experts, and their other tensors, by their names in the model."""
    tensors: dict[str, Tensor] = {}
    for name, weight in experts.quantized():
        tensors |= {f"{place_of(name)}.{suffix}": t for suffix, t in tensors_of(name, weight, source).items()}
    rest = {f"{path}.{name}": tensor for name, tensor in experts.experts.state_dict().items()}
    for name, stack in zip(experts.form.stacked, (experts.up, experts.down), strict=True):
        if stack.bias is not None:
            rest |= _biases(f"{path}.{name}_bias", stack.bias.detach(), stack.stacking, place_of, source)
    return tensors, rest


def _biases(
    stacked: str, bias: Tensor, stacking: Stacking, place_of: Callable[[str], str], source: Source
) -> dict[str, Tensor]:
    """The biases (E, N), separately for each expert if the checkpoint stores them separately."""
    if f"{stacking.names[0][0]}.bias" not in source.checkpoint:
        return {stacked: bias}
    return {
        f"{place_of(part)}.bias": bias[e][rows.to(bias.device)]
        for e, names in enumerate(stacking.names)
        for part, rows in zip(names, stacking.rows, strict=True)
    }


def tensors_of(name: str, weight: QuantizedTensor, source: Source) -> dict[str, Tensor]:
    """The tensors of `weight`, which belongs to module `name`, in the format of the source, by suffix."""
    weight = weight.to(torch.device("cpu"))
    try:
        if _same(source.files.read(name), weight):
            return {suffix: source.checkpoint.tensor(f"{name}.{suffix}") for suffix in source.suffixes(name)}
    except CheckpointError as error:
        unreadable: CheckpointError | None = error
    else:
        unreadable = None
    packed = source.files.pack(name, weight)
    with source.at_hand(name, packed) as read_back:
        if _same(read_back.read(name), weight):
            return packed
    raise FormatError(
        f"{name} cannot be written like {source.checkpoint.folder}" + (f": {unreadable}" if unreadable else ""),
        hint="keep the folder of the model until the model is saved",
    )


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two weights are exactly equal."""
    if a.scheme != b.scheme or (a.zeros is None) != (b.zeros is None):
        return False
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.column_groups(), b.column_groups())]
    if a.zeros is not None and b.zeros is not None:
        pairs.append((a.zeros, b.zeros))
    return all(torch.equal(one, other) for one, other in pairs)
