"""transformers' own `from_pretrained` and `save_pretrained` on quantized checkpoints, run by llmq.

transformers knows gptq, awq, compressed-tensors and auto-round, and hands each to a package that must be installed.
`enable_transformers` puts llmq in their place, in the two tables in which transformers looks them up; then

    AutoModelForCausalLM.from_pretrained("OUT")

gives a model whose linear layers are `PackedLinear` and whose experts are `PackedExperts`.  While it loads, layers hold
the checkpoint's own tensors (`stored.py`), so that device maps, sharding and offloading are transformers' business.
Saving writes the tensors and the quantization_config of the checkpoint again (`saving.py`).
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
from llmq.runtime.checkpoint_weights import required_settings
from llmq.runtime.transformers.placement import cast_as_planned, place_stored, run_packed
from llmq.runtime.transformers.saving import stored_state
from llmq.runtime.transformers.stored_linear import Source, StoredLinear

logger = logging.getLogger(__name__)


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` as it stands in config.json, every key of it."""

    def __init__(self, **settings: Any) -> None:
        self._settings = copy.deepcopy(settings)
        self.quant_method = settings.get("quant_method")

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._settings)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_config, (self._settings,)  # no class made by `enable_transformers` is found by its name

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls a quantizer: makes room for the packed weights before loading, and runs them after."""

    requires_calibration = True  # weights are packed by `llmq.quantize`, never while loading
    is_trainable = True  # adapters beside the layers; the codes stay
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            method = quantization_config.quant_method
            raise FormatError(
                f"the model is not quantized, and {getattr(method, 'value', method)} is asked for while loading it",
                hint="quantize it first: llmq quantize MODEL OUT; then load OUT without a quantization_config",
            )
        super().__init__(quantization_config, **kwargs)
        self._source: Source | None = None
        self._dtypes: dict[str, torch.dtype] = {}  # of the parameters, as they are to be loaded
        self._codes: list[str] = []  # those of them that hold codes, and are called as floats are

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_quantizer, (self.quantization_config.to_dict(), self._source)

    @staticmethod
    def for_saving(checkpoint: Checkpoint) -> "PackedQuantizer":
        """For a model that was loaded without transformers' loading, so that it can be saved with its saving."""
        return _restored_quantizer(required_settings(checkpoint), Source(checkpoint))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before anything is built, what llmq cannot read."""
        settings = self.quantization_config.to_dict()
        try:
            formats.detect(settings).read_config(settings)
        except FormatError as error:
            hint = "llmq.disable_transformers() leaves such checkpoints to the package that transformers names for them"
            raise FormatError(str(error), hint="; ".join(filter(None, (error.hint, hint)))) from error

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        with torch.device("cpu"):  # transformers builds models in the context of the meta device
            self._source = Source(_opened(checkpoint_files, self.quantization_config.to_dict()))
            place_stored(model, self._source)
            for note in self._source.files.notes():
                logger.warning("%s", note)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        stored = (path for path, module in model.named_modules() if isinstance(module, StoredLinear))
        self._codes = [name for name in (f"{path}.weight" for path in stored) if name in self._dtypes]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Keep transformers from stacking an expert's `weight_packed`, whose name begins as `weight` does, or codes."""
        kept: list[Any] = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion.compiled_sources = re.compile(f"(?:{conversion.compiled_sources.pattern})(?!_)")
            if not (isinstance(conversion, WeightConverter) and self._takes_codes(conversion)):
                kept.append(conversion)
        updated: list[Any] = super().update_weight_conversions(kept, *model)
        return updated

    def _takes_codes(self, conversion: Any) -> bool:
        """Whether it would stack the codes of experts, where these are called `weight` as floats are."""
        codes = next((name for name in self._codes if conversion.compiled_sources.search(name)), None)
        if codes is None:
            return False
        floats = (name for name in self._dtypes for end in conversion.target_patterns if name.endswith(end))
        stacked = next(floats, None)
        if stacked is not None:
            raise FormatError(
                f"{codes} holds codes, and {stacked} is put together from floats of such names",
                hint="llmq.load tells them apart",
            )
        return True

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not hasattr(HfQuantizer, "get_new_dtype"):  # before 5.2x, parameters that were renamed were not cast
            cast_as_planned(model, self._dtypes)
        left = run_packed(model)
        if left:
            logger.warning(
                "%d layers run by dequantizing at every call, %s for one: their tensors are offloaded, or on no grid",
                len(left), left[0],
            )  # fmt: skip

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to write, as the checkpoint had them; None where adapters alone are written."""
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

    From then on `from_pretrained` needs none of gptqmodel, autoawq, compressed-tensors, auto-round and optimum; where
    they are installed they are not used.  Calling it again changes nothing; `disable_transformers` undoes it.
    """
    for method in sorted(layout.quant_methods[0] for layout in formats.readable() if layout.in_transformers):
        for table, ours in (
            (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
            (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
        ):
            theirs = table.get(method)
            if theirs is None or not issubclass(theirs, ours):
                # Their name, by which transformers tells whether a config that a user passes fits the checkpoint's.
                name = ours.__name__ if theirs is None else theirs.__name__
                table[method] = type(name, (ours,), {"replaced": theirs, "__module__": __name__})


def disable_transformers() -> None:
    """Undo `enable_transformers`: what transformers had before is in its place again.  Loaded models keep running."""
    for table, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
        (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
    ):
        for method, found in list(table.items()):
            if issubclass(found, ours) and found is not ours:
                if found.replaced is None:
                    del table[method]
                else:
                    table[method] = found.replaced


def _opened(checkpoint_files: Sequence[str] | None, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that transformers is about to load."""
    if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
        raise FormatError(
            "a packed model is loaded from safetensors files; found "
            + (str(checkpoint_files[0]) if checkpoint_files else "none"),
            hint="give from_pretrained a folder or a name on the Hub, and no state_dict",
        )
    opened = Checkpoint.open(Path(checkpoint_files[0]).parent)
    config = {**opened.config, "quantization_config": dict(settings)}  # which may stand in a part of config.json
    return Checkpoint(opened.folder, config, opened.files, opened._tensors)
