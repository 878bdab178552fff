"""The checkpoint as the model names it: find a parameter's tensor, put real tensors into a module."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build import conv1d


class ModelWeights:
    """Tensors by the name that a parameter has in the model.

    The checkpoint may use the same names, leave out (or have) the base model's prefix, or use the names that
    transformers knows it by; tied parameters are stored once.  `read` gives a tensor by its name in the checkpoint,
    `stored` says whether it holds that name, `quantized` whether it holds it as codes and not in float; `expect` may
    begin to read tensors that come next.  Weights that the checkpoint stores as (K, N) are (N, K) here; those in
    `unpacked`, names in the checkpoint, `read` gives as (N, K) already.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[str], Tensor],
        stored: Callable[[str], bool],
        unpacked: Container[str] = (),
        expect: Callable[[Iterable[str]], None] | None = None,
        quantized: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._expect = expect
        self.stored_dtypes: dict[str, torch.dtype] = {}  # of every parameter that was filled, by its name in the model
        self._read = read
        self._stored = stored
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))  # as the configuration has it
        self._renamings = _renamings(model)
        self._transposed = conv1d.transposed_names(model)
        self._unpacked = unpacked
        self._quantized = quantized
        self.merged_into: dict[str, str] = {}  # by its name in the checkpoint, the parameter that a tensor is part of
        self._merged: dict[str, Callable[[], Tensor]] = {}
        self._places: dict[str, str] = {}
        self.stacked_in: dict[str, str] = {}  # by the name of an expert's tensor, the stored one that it is a part of
        self._parts: Counter[str] = Counter()

    def expect(self, names: Iterable[str]) -> None:
        """Tensors that will be read next, by their names in the checkpoint."""
        if self._expect is not None:
            self._expect(names)

    def place(self, names: Mapping[str, str]) -> None:
        """Say what the checkpoint calls the modules at some paths."""
        self._places |= names

    def provide(self, tensors: Mapping[str, Callable[[], Tensor]], stacked_in: Mapping[str, str]) -> None:
        """Add tensors that the checkpoint holds as parts of stacked ones."""
        read, stored = self._read, self._stored
        self._read = lambda name: tensors[name]() if name in tensors else read(name)
        self._stored = lambda name: name in tensors or stored(name)
        self.stacked_in |= stacked_in
        self._parts.update(stacked_in.values())

    def merge(self, name: str, sources: Iterable[str], read: Callable[[], Tensor]) -> None:
        """Read a parameter with `read`, which makes it of the tensors `sources`."""
        self._merged[name] = read
        self.merged_into |= dict.fromkeys(sources, name)

    def parts_of(self, stacked: str) -> int:
        """Of how many tensors, all of one size, a stacked one consists."""
        return self._parts[stacked]

    def stored_name(self, name: str) -> str | None:
        """The checkpoint's name of a parameter, if it holds one."""
        return next((candidate for candidate in self.candidates(name) if self._stored(candidate)), None)

    def left_stacked(self, name: str, packed: Container[str]) -> bool:
        """Whether an expert's tensor stays a part of a stacked one: where its module is not among those `packed`."""
        return name in self.stacked_in and name.rpartition(".")[0] not in packed

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
        if parameter.dim() > 2 and self.lacks(name):
            raise UnsupportedModelError(
                f"{name} stacks weights of experts, or others, {tuple(parameter.shape)}, which the checkpoint stores "
                "one by one",
                hint="llmq knows no way to take them apart; please report the architecture",
            )

    def module_name(self, path: str) -> str:
        """The checkpoint's name of the module at `path`; `path` itself where it stores no weight of it."""
        stored = (candidate for candidate in self.candidates(path) if self._stored(f"{candidate}.weight"))
        return next(stored, path)

    def is_tied(self, name: str) -> bool:
        """Whether the parameter is stored only as another that it is tied to."""
        return name in self._tied and not any(self._stored(candidate) for candidate in self.candidates(name))

    def is_borrowed(self, name: str) -> bool:
        """Whether the checkpoint holds the parameter, but not by itself: as another's, or as parts of it."""
        return name in self._merged or self.is_tied(name)

    def is_quantized(self, name: str) -> bool:
        """Whether the checkpoint holds the parameter, or what it is made of, as codes and not in float."""
        if name in self._merged:
            return any(self._quantized(source) for source, merged in self.merged_into.items() if merged == name)
        stored = self.tensor_name(name)
        return self._quantized(self.stacked_in.get(stored, stored))

    def is_shared(self, name: str) -> bool:
        """Whether the parameter is tied to another, whichever of them is stored."""
        return name in self._tied or name in self._tied.values()

    def is_fixed(self, name: str) -> bool:
        """Whether the parameter cannot be changed by itself."""
        return self.is_borrowed(name) or self.is_shared(name)

    def lacks(self, name: str) -> bool:
        """Whether nothing has been found that the parameter could be read from."""
        return name not in self._merged and name not in self._tied and self.stored_name(name) is None

    def candidates(self, name: str) -> list[str]:
        """What the checkpoint may call the parameter or module `name`."""
        for known in (name, name.rpartition(".")[0]):
            if known in self._places:
                return [self._places[known] + name[len(known) :]]
        renamed = f"{name}."  # the dot lets a renaming of `lm_head.` fit the module too
        for renaming in self._renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        return [name, name.removeprefix(self._prefix), self._prefix + name, renamed.removesuffix(".")]

    def fill(self, path: str, module: nn.Module, device: torch.device) -> None:
        """Put tensors behind a module's own parameters and stored buffers, in the dtypes that they have on meta."""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                tensor = self._checked(f"{path}.{key}" if path else key, parameter)
                module._parameters[key] = nn.Parameter(
                    tensor.to(device, parameter.dtype, non_blocking=True), requires_grad=False
                )
        for key, buffer in module._buffers.items():
            if buffer is not None:
                name = next((c for c in self.candidates(f"{path}.{key}") if self._stored(c)), None)
                real = buffer if name is None else self._read(name).to(buffer.dtype)
                module._buffers[key] = real.to(device)

    def original(self, name: str) -> Tensor:
        """The tensor of a parameter in the checkpoint's dtype, and the model's shape."""
        if name in self._merged:
            return self._merged[name]()
        stored = self.tensor_name(name)
        return self._read(stored) if stored in self._unpacked else self.turned(name, self._read(stored))

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor by its name in the checkpoint."""
        return self._read(name)

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's tensor from the checkpoint's shape to the model's, or back: (N, K) is (K, N) in some."""
        return tensor.T.contiguous() if name in self._transposed else tensor

    def _checked(self, name: str, parameter: Tensor) -> Tensor:
        tensor = self.original(name)
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
