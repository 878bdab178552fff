"""Load a quantized checkpoint as a transformers model that runs packed, or a float checkpoint as usual.

The module tree is built on the meta device. Each packed linear layer is replaced by a `PackedLinear`, packed experts by
`PackedExperts`, and all other tensors are read unchanged. There is never a full-precision copy of more than one layer.
Layers with the same input are fused (`runtime/fused_linear.py`).
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from llmq.checkpoint import hub
from llmq.checkpoint.index import refuse_adapter, refuse_gguf
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import BackendError, CheckpointError, FormatError
from llmq.model.build import module_tree, ties
from llmq.model.build.block import is_plain_linear
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.input_rounding import with_rounded_input
from llmq.model.build.merged_tensors import merge
from llmq.model.experts.stacking import Stacking, all_packed, find_stackings, stackings_of
from llmq.numerics.fake_quantize import rounding_for
from llmq.runtime.checkpoint_weights import PackedWeights, required_settings, shape_of
from llmq.runtime.float_experts import FloatExperts
from llmq.runtime.fused_linear import fuse_rows, shared_inputs
from llmq.runtime.open_skeleton import open_model
from llmq.runtime.packed_experts import fill_experts, pack_experts, require_form
from llmq.runtime.packed_linear import PackedLinear, PackedRows

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
) -> tuple[Any, Any]:
    """Load a model, quantized or not, and its tokenizer, ready for `model.generate`.

    `path` is a folder or a Hub id. `dtype` is the dtype of activations and unpacked weights: by default that of the
    checkpoint, but float32 on a CPU, where half precision is slow. With `fuse`, packed layers with the same input (q, k
    and v; gate and up) run as one product; without, each is a separate `PackedLinear`. Raises CheckpointError,
    FormatError and UnsupportedModelError.
    """
    folder = hub.locate(str(path), revision, remote_code=trust_remote_code)
    refuse_gguf(folder)  # before the tokenizer, whose error would be misleading
    tokenizer = load_tokenizer(folder, remote_code=trust_remote_code)
    model = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, fuse=fuse)
    return model, tokenizer


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
) -> Any:
    """Load the model without tokenizer from a local folder; otherwise like `load`."""
    checkpoint = Checkpoint.open(folder)
    chosen = choose_device(device)
    if dtype is None:
        dtype = torch.float32 if chosen.type == "cpu" else stored_dtype(checkpoint)
    opened = open_model(checkpoint, dtype, remote_code=trust_remote_code)
    for note in opened.remarks:
        logger.warning("%s", note)
    if opened.packed is None:
        refuse_adapter(folder)
        config = module_tree.load_config(folder, remote_code=trust_remote_code)
        kind = module_tree.auto_class(config, remote_code=trust_remote_code)
        float_model = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return float_model.to(chosen).eval()
    model = module_tree.build(folder, dtype=dtype, remote_code=trust_remote_code)
    checkpoint = ties.settled(checkpoint, model, opened.packed.weight_names())
    _fill_packed(model, checkpoint, chosen, fuse=fuse)
    _restore_generation(model, folder)
    _make_savable(model, checkpoint)
    return model


def load_tokenizer(folder: Path, *, remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint; raises CheckpointError if there is none."""
    from transformers import AutoTokenizer

    hint = "copy tokenizer.json and tokenizer_config.json from the original model into the folder"
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer", hint=hint)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # tokenizer classes raise many types of errors
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", hint=hint) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def choose_device(name: str | torch.device) -> torch.device:
    """Turn `auto`, `cpu` or `cuda[:N]` into an available device; raises BackendError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}", hint="use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"llmq does not run on {device.type}", hint="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"{name} is not available: torch sees {torch.cuda.device_count()} CUDA devices", hint="use --device cpu"
        )
    return device


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in config.json, or that of the first float tensor."""
    dtypes = (checkpoint.info(name).dtype for name in checkpoint.names())
    return configured_dtype(checkpoint.config) or next((d for d in dtypes if d in MODEL_DTYPES), torch.float32)


def configured_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names; None if it names none that models have."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        named = part.get("dtype") or part.get("torch_dtype")
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        if dtype in MODEL_DTYPES:
            return cast(torch.dtype, dtype)
    return None


def _fill_packed(model: nn.Module, checkpoint: Checkpoint, device: torch.device, *, fuse: bool) -> None:
    packed = PackedWeights(checkpoint)
    for note in packed.notes():
        logger.warning("%s", note)
    waiting = {module for module in packed.modules if packed.is_affine(module)}
    weights = ModelWeights(model, packed.tensor, packed.__contains__, frozenset(packed.weight_names()))
    merge(model, weights, checkpoint.names())
    complete = _groups_by_last(model, weights, waiting) if fuse else {}
    modules = dict.fromkeys([*packed.modules, *checkpoint.modules_with("weight")])
    stackings = find_stackings(model, weights, modules, partial(shape_of, checkpoint, packed))
    for path, module in list(model.named_modules()):
        name = next((candidate for candidate in weights.candidates(path) if candidate in waiting), None)
        if name is not None and is_plain_linear(module):
            bias = checkpoint.tensor(f"{name}.bias").to(module.weight.dtype) if module.bias is not None else None
            model.set_submodule(
                path, PackedLinear(packed.read(name), bias, module.weight.dtype, packed.inputs(name)).to(device)
            )
            waiting.discard(name)
            fuse_rows(model, complete.get(path, ()))
        elif own := stackings_of(path, module, stackings):
            _fill_experts(model, path, own, packed, waiting, weights, device)
        else:
            weights.fill(path, module, device)
            if is_plain_linear(module):
                _round_inputs(path, module, packed, weights)
    for module in model.modules():
        if isinstance(module, PackedRows):
            module.prepare()
    if waiting:
        raise FormatError(
            f"the model has no linear layer for {sorted(waiting)[0]} ({len(waiting)} packed weights in total)"
        )
    ties.tie(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:  # torch would silently compute garbage
        raise CheckpointError(f"the checkpoint has no tensor for {empty[0]} ({len(empty)} parameters in total)")


def _round_inputs(path: str, linear: nn.Module, packed: PackedWeights, weights: ModelWeights) -> None:
    """Quantize the inputs of a layer that runs dequantized, if the checkpoint declares this."""
    name = next((candidate for candidate in weights.candidates(path) if candidate in packed.modules), None)
    if name is not None and (inputs := packed.inputs(name)) is not None:
        rounding = rounding_for(inputs)
        linear.register_forward_pre_hook(lambda _, *given: with_rounded_input(rounding, *given), with_kwargs=True)


def _fill_experts(
    model: nn.Module,
    path: str,
    stackings: Sequence[Stacking],
    packed: PackedWeights,
    waiting: set[str],
    weights: ModelWeights,
    device: torch.device,
) -> None:
    """Fill or pack the experts at `path`, and remove their packed weights from `waiting`."""
    experts = model.get_submodule(path)
    if all_packed(path, stackings, waiting):
        model.set_submodule(path, pack_experts(path, experts, stackings, packed, weights, device))
        waiting.difference_update(*(stacking.modules() for stacking in stackings))
    else:
        fill_experts(path, experts, stackings, weights, device)
        _round_inputs_of_experts(model, path, stackings, packed)


def _round_inputs_of_experts(model: nn.Module, path: str, stackings: Sequence[Stacking], packed: PackedWeights) -> None:
    """Quantize the inputs of experts that run dequantized, if the checkpoint declares this, alike for all of them."""
    modules = frozenset(packed.modules)
    schemes = [{packed.inputs(m) if m in modules else None for m in stacking.modules()} for stacking in stackings]
    if any(len(of_parts) > 1 for of_parts in schemes):
        logger.warning("%s has float inputs here: the checkpoint declares different ones for its experts", path)
    elif any(of_parts != {None} for of_parts in schemes):
        roundings = [None if scheme is None else rounding_for(scheme) for (scheme,) in schemes]
        experts = model.get_submodule(path)
        model.set_submodule(path, FloatExperts(experts, require_form(experts), roundings))


def _groups_by_last(model: nn.Module, weights: ModelWeights, packed: Collection[str]) -> dict[str, list[str]]:
    """The groups of layers that share an input, keyed by the layer of each group that is filled last."""
    order = {
        path: position
        for position, (path, module) in enumerate(model.named_modules())
        if any(candidate in packed for candidate in weights.candidates(path)) and is_plain_linear(module)
    }
    return {max(group, key=order.__getitem__): group for group in shared_inputs(model, order)}


def _make_savable(model: Any, checkpoint: Checkpoint) -> None:
    """Let `save_pretrained` write the packed tensors of the checkpoint and the quantization_config."""
    from llmq.runtime.transformers.quantizer import PackedQuantizer

    if getattr(model.config, "quantization_config", None) is None:  # from a separate file, which would not be saved
        model.config.quantization_config = required_settings(checkpoint)
    model.hf_quantizer = PackedQuantizer.for_saving(checkpoint)


def generation_settings(folder: Path) -> Any:
    """The settings in generation_config.json; raises CheckpointError if they are damaged."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # wrong values raise many types of errors
        hint = "copy generation_config.json from the original model"
        raise CheckpointError(f"the generation settings in {folder} cannot be read: {error}", hint=hint) from error


def _restore_generation(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = generation_settings(folder)
