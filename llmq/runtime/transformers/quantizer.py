"""Let `from_pretrained` and `save_pretrained` of transformers load and save quantized checkpoints with llmq.

transformers knows gptq, awq, compressed-tensors and auto-round, and needs another package for each.
`enable_transformers` replaces them by llmq in the two tables in which transformers looks them up. Then

    AutoModelForCausalLM.from_pretrained("OUT")

returns a model with `PackedLinear` layers and `PackedExperts`. During loading, layers hold the tensors of the
checkpoint (`stored_linear.py`), so that transformers can handle device maps, sharding and offloading. Saving writes the
tensors and the quantization_config of the checkpoint (`saving.py`).
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq import formats
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import FormatError
from llmq.model.build import ties
from llmq.runtime.checkpoint_weights import PackedWeights, required_settings
from llmq.runtime.open_skeleton import compared
from llmq.runtime.transformers.placement import cast_as_planned, place_stored, run_packed
from llmq.runtime.transformers.saving import stored_state
from llmq.runtime.transformers.stored_linear import Source, StoredLinear

logger = logging.getLogger(__name__)


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` with all keys from config.json."""

    def __init__(self, **settings: Any) -> None:
        self._settings = copy.deepcopy(settings)
        self.quant_method = settings.get("quant_method")

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._settings)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_config, (self._settings,)  # classes made by `enable_transformers` cannot be imported by name

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """A quantizer of transformers: replaces layers before loading, and packs them after loading."""

    requires_calibration = True  # weights are packed by `llmq.quantize`, never while loading
    is_trainable = True  # adapters are trained; the quantized values are fixed
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            method = quantization_config.quant_method
            raise FormatError(
                f"the model is not quantized, but loading requests {getattr(method, 'value', method)}",
                hint="quantize it first: llmq quantize MODEL OUT; then load OUT without a quantization_config",
            )
        super().__init__(quantization_config, **kwargs)
        self._source: Source | None = None
        self._dtypes: dict[str, torch.dtype] = {}  # the dtypes in which parameters are loaded
        self._codes: list[str] = []  # parameters that hold quantized values under the name of a float weight

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_quantizer, (self.quantization_config.to_dict(), self._source)

    @staticmethod
    def for_saving(checkpoint: Checkpoint) -> "PackedQuantizer":
        """A quantizer for a model loaded by llmq, so that `save_pretrained` works."""
        return _restored_quantizer(required_settings(checkpoint), Source(checkpoint))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise FormatError for a format that llmq cannot read, before the model is built."""
        settings = self.quantization_config.to_dict()
        try:
            formats.detect(settings).read_config(settings)
        except FormatError as error:
            hint = "llmq.disable_transformers() lets transformers load such checkpoints with another package"
            raise FormatError(str(error), hint="; ".join(filter(None, (error.hint, hint)))) from error

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        with torch.device("cpu"):  # transformers builds models in the context of the meta device
            checkpoint = compared(_opened(checkpoint_files, self.quantization_config.to_dict())).checkpoint
            packed = PackedWeights(checkpoint).weight_names()
            self._source = Source(ties.settled(checkpoint, model, packed))
            place_stored(model, self._source)
            for note in self._source.files.notes():
                logger.warning("%s", note)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        stored = (path for path, module in model.named_modules() if isinstance(module, StoredLinear))
        self._codes = [name for name in (f"{path}.weight" for path in stored) if name in self._dtypes]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Keep transformers from stacking `weight_packed`, which starts like `weight`, or other packed values."""
        conversions: list[Any] = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion.compiled_sources = re.compile(f"(?:{conversion.compiled_sources.pattern})(?!_)")
            if not (isinstance(conversion, WeightConverter) and self._takes_codes(conversion)):
                conversions.append(conversion)
        updated: list[Any] = super().update_weight_conversions(conversions, *model)
        return updated

    def _takes_codes(self, conversion: Any) -> bool:
        """Whether a conversion would stack the quantized values of experts, which may be named `weight`."""
        codes = next((name for name in self._codes if conversion.compiled_sources.search(name)), None)
        if codes is None:
            return False
        floats = (name for name in self._dtypes for end in conversion.target_patterns if name.endswith(end))
        stacked = next(floats, None)
        if stacked is not None:
            raise FormatError(
                f"{codes} holds quantized values, but {stacked} is made from floats with such names",
                hint="use llmq.load, which can distinguish them",
            )
        return True

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not hasattr(HfQuantizer, "get_new_dtype"):  # versions before 5.2x did not cast renamed parameters
            cast_as_planned(model, self._dtypes)
        left = run_packed(model)
        if left:
            logger.warning(
                "%d layers are dequantized at every call, such as %s: they are offloaded, or not on an integer grid",
                len(left), left[0],
            )  # fmt: skip

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to write, as in the checkpoint; None if only adapters are written."""
        if getattr(model, "_hf_peft_config_loaded", False) or self._source is None:
            return None, {}
        return stored_state(model, self._source), {}


def _restored_config(settings: Mapping[str, Any]) -> PackedConfig:
    return PackedConfig(**settings)


def _restored_quantizer(settings: Mapping[str, Any], source: Source | None) -> PackedQuantizer:
    quantizer = PackedQuantizer(PackedConfig(**settings))
    quantizer._source = source
    return quantizer


def enable_transformers() -> None:
    """Let transformers load gptq, awq, compressed-tensors and auto-round checkpoints with llmq, in this process.

    From then on `from_pretrained` does not need or use gptqmodel, autoawq, compressed-tensors, auto-round and optimum.
    Calling it again has no effect; `disable_transformers` undoes it.
    """
    for method in sorted(layout.quant_methods[0] for layout in formats.readable() if layout.in_transformers):
        for table, ours in (
            (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
            (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
        ):
            theirs = table.get(method)
            if theirs is None or not issubclass(theirs, ours):
                # The same name: transformers compares it with the class of the config that a user passes.
                name = ours.__name__ if theirs is None else theirs.__name__
                table[method] = type(name, (ours,), {"replaced": theirs, "__module__": __name__})


def disable_transformers() -> None:
    """Undo `enable_transformers` and restore the previous classes. Loaded models keep running."""
    for table, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
        (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
    ):
        for method, installed in list(table.items()):
            if issubclass(installed, ours) and installed is not ours:
                if installed.replaced is None:
                    del table[method]
                else:
                    table[method] = installed.replaced


def _opened(checkpoint_files: Sequence[str] | None, settings: Mapping[str, Any]) -> Checkpoint:
    """Open the checkpoint that transformers is about to load."""
    if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
        raise FormatError(
            f"found {checkpoint_files[0] if checkpoint_files else 'no files'}, expected packed safetensors files",
            hint="give from_pretrained a folder or a Hub id, and no state_dict",
        )
    opened = Checkpoint.open(Path(checkpoint_files[0]).parent)
    config = {**opened.config, "quantization_config": dict(settings)}  # it may be nested in config.json
    return Checkpoint(opened.folder, config, opened.files, opened._tensors)
