"""Build the module tree of transformers on meta, from config.json."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq.checkpoint.index import read_json_object
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build import conv1d

CONFIG = "config.json"
# Keys of config.json that count modules, and those of sizes, with the largest plausible value: building a model takes
# seconds with as many modules of one kind, and megabytes with buffers of such sizes.
LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)")
LIMITS = (
    (re.compile(rf"{LAYERS.pattern}|\w+_layers|depth"), 512),
    (re.compile(r"(num|n)_(\w+_)?experts"), 4096),
    (re.compile(r"\w+_(size|dim|rank|width|embd|heads|head)|d_\w+|n_(embd|head|inner)"), 2**24),
)
FEW_LAYERS = 64


def build(folder: Path, *, dtype: torch.dtype, remote_code: bool) -> nn.Module:
    """The causal language model of a checkpoint's config.json, with all parameters on meta and real buffers.

    Every `Conv1D` is an `nn.Linear` (`conv1d.py`).
    """
    return from_config(load_config(folder, remote_code=remote_code), dtype=dtype, remote_code=remote_code)


def from_config(config: Any, *, dtype: torch.dtype, remote_code: bool) -> nn.Module:
    """The same for a configuration of transformers, as `load_config` returns it."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto_class(config, remote_code=remote_code).from_config(
                config, dtype=dtype, trust_remote_code=remote_code
            )
    except Exception as error:  # a wrong value in config.json fails wherever the model first uses it
        raise UnsupportedModelError(
            f"transformers cannot build the model that its config.json describes: {_first_line(error)}",
            hint="check that config.json is complete; a newer transformers may know the model",
        ) from error
    conv1d.apply(model)
    return model.eval().requires_grad_(False)


def load_config(folder: Path, *, remote_code: bool) -> Any:
    """The transformers configuration of a checkpoint; raises UnsupportedModelError if it is not a causal LM."""
    from transformers import AutoConfig

    _require_plausible(folder, read_json_object(folder / CONFIG))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # strict validation, missing code and unknown types raise different exceptions
        needs_code = "trust_remote_code" in str(error)
        hint = "pass --trust-remote-code if you trust its author" if needs_code else "a newer transformers may know it"
        raise UnsupportedModelError(
            f"transformers cannot read the configuration in {folder}: {error}", hint=hint
        ) from error
    if auto_class(config, remote_code=remote_code) is None or getattr(config, "is_encoder_decoder", False):
        architecture = ", ".join(config.architectures or ()) or config.model_type
        raise UnsupportedModelError(
            f"{folder} holds {architecture}, expected a causal language model",
            hint="use a decoder that generates text (…ForCausalLM, or …ForConditionalGeneration of models that also "
            "take images); encoders and encoder-decoders are not supported",
        )
    return config


def _require_plausible(folder: Path, config: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for numbers with which building the model would never end, and for wrong types."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        message = f"{folder / CONFIG} declares the architectures {names!r}, expected a list of names"
        raise UnsupportedModelError(message, hint="download or copy the file again")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # such as text_config
    for key, number in (item for part in parts for item in part.items()):
        limit = next((most for keys, most in LIMITS if keys.fullmatch(key)), None)
        if limit is not None and isinstance(number, int) and number > limit:
            message = f"{folder / CONFIG} declares {key} as {number}, expected at most {limit}"
            raise UnsupportedModelError(message, hint="download or copy the file again")


def require_tensors_for_layers(folder: Path, tensors: int) -> None:
    """Raise CheckpointError if config.json declares more layers than the weights have tensors.

    It takes seconds to build a model of many layers. Up to `FEW_LAYERS` are left to the comparison of all tensors.
    """
    config = read_json_object(folder / CONFIG)
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key, number in part.items():
            if LAYERS.fullmatch(key) and isinstance(number, int) and number > max(FEW_LAYERS, tensors):
                raise CheckpointError(
                    f"{folder / CONFIG} declares {key} as {number}, and the weights have {tensors} tensors",
                    hint="copy config.json from the original model, or download the missing weights",
                )


def auto_class(config: Any, *, remote_code: bool) -> Any:
    """The Auto class of transformers for a configuration; None if the model does not generate text from text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    if remote_code and getattr(config, "auto_map", None):
        return AutoModelForCausalLM  # the author's own code
    for kind, mapping in (
        (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        names = mapping.get(config.model_type, ())
        known = {names} if isinstance(names, str) else set(names)
        if known & set(config.architectures or known):
            return kind
    return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
