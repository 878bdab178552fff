"""The checkpoint as the model names it: find a parameter's tensor, put real tensors into a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import CheckpointError, UnsupportedModelError


class ModelWeights:
    """Tensors by the name that a parameter has in the model.

    The checkpoint may use the same names, leave out (or have) the base model's prefix, or use the names that
    transformers knows it by; tied parameters are stored once.  `read` gives a tensor by its name in the checkpoint,
    `stored` says whether it holds that name.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], Tensor], stored: Callable[[str], bool]) -> None:
        self.stored_dtypes: dict[str, torch.dtype] = {}  # of every parameter that was filled, by its name in the model
        self._read = read
        self._stored = stored
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))  # as the configuration has it
        self._renamings = _renamings(model)

    def tensor_name(self, name: str) -> str:
        """The checkpoint's name of a parameter; raises CheckpointError where it holds none."""
        for candidate in [*self.candidates(name), *self.candidates(self._tied.get(name, name))]:
            if self._stored(candidate):
                return candidate
        raise CheckpointError(
            f"the model needs the tensor {name}, which the checkpoint does not hold",
            hint="is the checkpoint complete, and its config.json the one that belongs to it?",
        )

    def refuse_stacked(self, name: str, parameter: Tensor) -> None:
        """Raise UnsupportedModelError for experts that the model holds in one tensor and the checkpoint one by one."""
        if parameter.dim() > 2 and not any(self._stored(candidate) for candidate in self.candidates(name)):
            raise UnsupportedModelError(
                f"{name} stacks weights of experts, {tuple(parameter.shape)}, which the checkpoint stores one by one",
                hint="mixture-of-experts models are not covered yet",
            )

    def module_name(self, path: str) -> str:
        """The checkpoint's name of the module at `path`; `path` itself where it stores no weight of it."""
        stored = (candidate for candidate in self.candidates(path) if self._stored(f"{candidate}.weight"))
        return next(stored, path)

    def is_tied(self, name: str) -> bool:
        """Whether the parameter is stored only as another that it is tied to."""
        return name in self._tied and not any(self._stored(candidate) for candidate in self.candidates(name))

    def candidates(self, name: str) -> list[str]:
        """What the checkpoint may call the parameter or module `name`."""
        renamed = f"{name}."  # the dot lets a renaming of `lm_head.` fit the module too
        for renaming in self._renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        return [name, name.removeprefix(self._prefix), self._prefix + name, renamed.removesuffix(".")]

    def fill(self, path: str, module: nn.Module, device: torch.device) -> None:
        """Put tensors behind a module's own parameters and stored buffers, in the dtypes that they have on meta."""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                tensor = self._checked(f"{path}.{key}" if path else key, parameter)
                module._parameters[key] = nn.Parameter(tensor.to(device, parameter.dtype), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                name = next((c for c in self.candidates(f"{path}.{key}") if self._stored(c)), None)
                real = buffer if name is None else self._read(name).to(buffer.dtype)
                module._buffers[key] = real.to(device)

    def original(self, name: str) -> Tensor:
        """The tensor of a parameter as the checkpoint stores it."""
        return self._read(self.tensor_name(name))

    def _checked(self, name: str, parameter: Tensor) -> Tensor:
        tensor = self._read(self.tensor_name(name))
        self.stored_dtypes[name] = tensor.dtype
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(tensor.shape)}, the configuration asks for {tuple(parameter.shape)}",
                hint="is config.json the one that belongs to these weights?",
            )
        return tensor


def _renamings(model: nn.Module) -> list[Any]:
    """transformers' renamings of parameters on the way to the disk, such as `lm_head.` to GPT-NeoX's `embed_out.`"""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    loading = get_model_conversion_mapping(model, add_legacy=False)
    kept = [step for step in loading if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange)]
    return [step.reverse_transform() for step in reversed(kept)]


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor, of any dtype, holds NaN or Inf."""
    if tensor.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.to(torch.float32)  # the question is not asked of 8-bit floats
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise CheckpointError(
            f"{name} has {int((~finite).sum())} values that are NaN or infinite, expected finite ones",
            hint="the checkpoint is damaged, or its training diverged; nothing can be made of it",
        )
