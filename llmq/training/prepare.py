"""`llmq.prepare_qat`: a quantized model whose linear layers are trained on their grids.

The model is an ordinary transformers model in float32. Only these parameters are trainable: v and θ of each quantized
layer (`fake_quantized.py`), and the weights of norms, which are floats in the file anyway. So it trains with anything
that trains a transformers model, and its state dict is complete.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from llmq._keywords import Keywords
from llmq._quantize import quantize
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig
from llmq.errors import CheckpointError, ConfigError, UnsupportedModelError
from llmq.methods import METHODS
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.experts.stacking import DOWN, Form
from llmq.report.stored_record import read_record
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.load import load_model
from llmq.runtime.packed_experts import PackedExperts, PackedStack
from llmq.runtime.packed_linear import PackedLinear
from llmq.training.fake_quantized import FakeQuantizedLinear
from llmq.training.trained_experts import FakeQuantizedStack

logger = logging.getLogger(__name__)

ORIGIN = "llmq_origin"  # the attribute of a prepared model that holds its `Origin`
TRANSFORMS = {name for method in METHODS.values() for name in method.rotated().transforms}


@dataclass(frozen=True)
class Origin:
    """Where a prepared model comes from.

    folder     the quantized model whose layout the trained model gets
    names      path of a trained layer -> its name in the checkpoint
    norms      name of a trainable norm -> its name in the checkpoint
    untrained  names in the checkpoint of quantized weights that are not trained
    """

    folder: Path
    names: dict[str, str]
    norms: dict[str, str]
    untrained: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user: what is not trained."""
        if not self.untrained:
            return ()
        reason = "not on a grid of integers, or not a layer of the model"
        return (
            f"quantized weights that are not trained: {len(self.untrained)}, such as {self.untrained[0]} ({reason})",
        )


def prepare_qat(
    model: Any,
    start: str | Path | None = None,
    *,
    original: Any = None,
    tokenizer: Any = None,
    config: QuantConfig | None = None,
    trust_remote_code: bool = False,
    **settings: Unpack[Keywords],
) -> Any:
    """Return a transformers model whose linear layers are fake-quantized, for quantization-aware training.

        model = llmq.prepare_qat("out", original="Qwen/Qwen3-0.6B")      # out was written by llmq quantize
        model = llmq.prepare_qat("Qwen/Qwen3-0.6B", "start", bits=3, calibration="text.jsonl")
        ...                                                              # train it with anything
        llmq.convert_qat(model, "trained")

    model     a quantized folder or Hub id; or a float model (a folder, an id, or in memory with its `tokenizer`), which
              is quantized into the folder `start` first, with the settings of `llmq.quantize`
    original  for a quantized model: the float model from which it was made. Training then starts with each value at the
              place of its float weight within its cell, instead of in the middle, and values move sooner

    The model is on the CPU, in float32. A learning rate of 1e-3 suits all models. Raises the errors of `llmq.errors`.
    """
    folder = _quantized_folder(model, trust_remote_code=trust_remote_code)
    if folder is None:
        if start is None or original is not None:
            raise ConfigError(
                f"{model if isinstance(model, str | Path) else type(model).__name__} is not quantized",
                hint="give the folder for the quantized model that training starts from: prepare_qat(model, 'start')",
            )
        quantize(
            model, start, tokenizer=tokenizer, config=config, trust_remote_code=trust_remote_code, progress=False,
            **settings,
        )  # fmt: skip
        folder, original = Path(start), model
    elif start is not None or config is not None or settings:
        raise ConfigError(f"{model} is quantized already", hint="leave out the start folder and the settings")
    if isinstance(original, str | Path):
        original = load_model(
            hub.locate(str(original), remote_code=trust_remote_code), device="cpu", dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    return prepared(folder, original, remote_code=trust_remote_code)


def prepared(folder: Path, original: nn.Module | None, *, remote_code: bool = False) -> Any:
    """The model of a quantized `folder`, ready for training; see `prepare_qat`."""
    model = load_model(folder, device="cpu", dtype=torch.float32, trust_remote_code=remote_code, fuse=False)
    checkpoint = Checkpoint.open(folder)
    packed = PackedWeights(checkpoint)
    if original is not None and _is_transformed(folder):
        logger.warning("%s: its weights were transformed before they were quantized, so those of the original do not "
                       "show where values lie within their cells", folder)  # fmt: skip
        original = None
    weights = ModelWeights(model, packed.tensor, packed.__contains__, frozenset(packed.weight_names()))
    names = _replaced(model, original, packed, weights)
    if not names:
        raise UnsupportedModelError(
            f"{folder} has no weight on an integer grid, so there is nothing to train",
            hint="quantize to integers, such as --bits 4; --method best trains other grids, too",
        )
    model.requires_grad_(False)
    for path in names:
        layer = model.get_submodule(path)
        layer.offset.requires_grad_(True)
        layer.stretch.requires_grad_(layer.scheme.group_size != "tensor")
    norms = _norms(model, weights, checkpoint)
    for name in norms:
        model.get_parameter(name).requires_grad_(True)
    del model.hf_quantizer  # it refuses training, and would save packed layers
    model.config.__dict__.pop("quantization_config", None)
    trained = set(names.values())
    origin = Origin(folder, names, norms, tuple(name for name in packed.modules if name not in trained))
    for note in origin.notes:
        logger.warning("%s: %s", folder, note)
    setattr(model, ORIGIN, origin)
    return model


def _replaced(
    model: nn.Module, original: nn.Module | None, packed: PackedWeights, weights: ModelWeights
) -> dict[str, str]:
    """Replace the packed layers of `model` by fake-quantized ones; returns their paths and names in the checkpoint."""
    modules, names = frozenset(packed.modules), dict[str, str]()

    def part(name: str, reference: Tensor | None) -> FakeQuantizedLinear:
        return FakeQuantizedLinear(packed.read(name), reference, None, packed.inputs(name))

    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            name = next(candidate for candidate in weights.candidates(path) if candidate in modules)
            reference = _reference(original, path, module)
            model.set_submodule(path, FakeQuantizedLinear(packed.read(name), reference, module.bias, module.inputs))
            names[path] = name
        elif isinstance(module, PackedExperts):
            for side, parameter in (("up", module.form.up), ("down", DOWN)):
                stack: PackedStack = getattr(module, side)
                reference = _stacked_reference(original, f"{path}.{parameter}", stack, module.form)
                model.set_submodule(f"{path}.{side}", FakeQuantizedStack(stack, reference, part))
                for e, parts in enumerate(stack.stacking.names):
                    names |= {f"{path}.{side}.parts.{e}.{i}": name for i, name in enumerate(parts)}
    return names


def origin_of(model: Any) -> Origin:
    """The origin of a prepared model; raises ConfigError for another model."""
    origin = getattr(model, ORIGIN, None)
    if not isinstance(origin, Origin):
        raise ConfigError(
            f"the {type(model).__name__} was not made by llmq.prepare_qat", hint="prepare it before the training"
        )
    return origin


def _quantized_folder(model: Any, *, trust_remote_code: bool) -> Path | None:
    """The folder of `model` if it is quantized; None for a float model, in memory or on disk."""
    if not isinstance(model, str | Path):
        return None
    folder = hub.locate(str(model), remote_code=trust_remote_code)
    return None if quantization_settings(Checkpoint.open(folder)) is None else folder


def _is_transformed(folder: Path) -> bool:
    """Whether a run changed weights before it rounded them, or it is not known because llmq did not make the folder."""
    record = read_record(folder)
    stages = [stage for stage in record.get("stages", ()) if isinstance(stage, dict)]
    return not record or any(stage.get("stage") in TRANSFORMS and stage.get("kept") for stage in stages)


def _reference(original: nn.Module | None, path: str, layer: PackedLinear) -> Tensor | None:
    """The float weight (N, K) of a layer. Raises CheckpointError if the original has no such layer."""
    if original is None:
        return None
    shape = (layer.out_features, layer.in_features)
    try:
        module = original.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"the original has no layer {path}", hint="give the model that was quantized") from None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(module).__name__ == "Conv1D":  # of GPT-2, stored transposed
        weight = weight.T
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        raise CheckpointError(
            f"{path} is {shape} here, and {getattr(weight, 'shape', 'no weight')} in the original",
            hint="give the model that was quantized",
        )
    return weight.detach().to(device="cpu", dtype=torch.float32)


def _stacked_reference(original: nn.Module | None, path: str, stack: PackedStack, form: Form) -> Tensor | None:
    """The float weights (E, N, K) of stacked experts. Raises CheckpointError if the original has none of that shape."""
    if original is None:
        return None
    shape = (*stack.words.shape[:2], stack.in_features)
    holder, _, name = path.rpartition(".")
    try:
        weight = getattr(original.get_submodule(holder), name, None)
    except AttributeError:
        weight = None
    floats = weight.mT if form.transposed and isinstance(weight, Tensor) else weight
    if not isinstance(floats, Tensor) or tuple(floats.shape) != shape:
        raise CheckpointError(
            f"{path} is {shape} here, and {getattr(floats, 'shape', 'no weight')} in the original",
            hint="give the model that was quantized",
        )
    return floats.detach().to(device="cpu", dtype=torch.float32)


def _norms(model: nn.Module, weights: ModelWeights, checkpoint: Checkpoint) -> dict[str, str]:
    """The parameters of norms and their names in the checkpoint, where the checkpoint stores them unchanged."""
    norms = {}
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                stored = weights.stored_name(name)
                if stored is not None and stored in checkpoint and checkpoint.info(stored).shape == parameter.shape:
                    norms[name] = stored
    return norms
