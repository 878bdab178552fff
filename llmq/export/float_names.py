"""Whether transformers finds the float weights of a quantized model by their names.

Some models store the experts of a layer in one tensor. Quantized, each expert is a weight with a plain name, which
transformers does not read in a float model: it would initialize such experts at random, with a warning.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmq.errors import UnsupportedModelError
from llmq.export.quantized_source import QuantizedSource
from llmq.model.build import module_tree
from llmq.runtime.checkpoint_weights import PackedWeights

HINT = "quantize it to a format that its engine reads: --to compressed-tensors, or --to gguf"


def model_with(source: QuantizedSource, tensors: dict[str, Tensor], *, remote_code: bool, **options: Any) -> Any:
    """The model of transformers in float32 with these tensors, by their names in the checkpoint.

    Raises UnsupportedModelError if a quantized weight is not among those that the model reads, or a parameter has none.
    """
    config = module_tree.load_config(source.checkpoint.folder, remote_code=remote_code)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    kind: Any = type(module_tree.from_config(config, dtype=torch.float32, remote_code=remote_code))
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    with quietly():
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, attn_implementation=attention,
            output_loading_info=True, **options,
        )  # fmt: skip
    stacked = _stacked(source.packed)
    weights = {source.packed.weight_name(module) for module in source.packed.modules}
    unread = sorted(weights & set(report["unexpected_keys"])) or sorted(set(report["missing_keys"]) - stacked)
    if unread:
        raise UnsupportedModelError(
            f"transformers does not load {unread[0]} from a float folder ({len(unread)} tensors in total): the "
            "original stores experts in stacked tensors, and the quantized model stores them one by one",
            hint=HINT,
        )
    return model.eval().requires_grad_(False)


def require_readable(source: QuantizedSource, *, remote_code: bool) -> None:
    """Raise UnsupportedModelError as `model_with` does, without reading a weight."""
    packed, stacked = source.packed, _stacked(source.packed)
    infos = {name: source.checkpoint.info(name) for name in source.other_names()}
    tensors = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
    for module in packed.modules:
        if module not in stacked:
            tensors[packed.weight_name(module)] = torch.empty(packed.shape(module), device="meta")
    model_with(source, tensors, remote_code=remote_code, device_map="meta")


def _stacked(packed: PackedWeights) -> set[str]:
    """Packed weights that hold all experts of a layer, as the original does."""
    return {module for module in packed.modules if packed.weight_name(module) == module}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the messages of transformers and its exporters; their errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
