"""Find the tensors of a model's parameters in a checkpoint, and fill modules with them."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build import conv1d


class ModelWeights:
    """The tensors of a checkpoint, by the names of the parameters in the model.

    The checkpoint may use the same names, leave out (or add) the base model's prefix, or use names that transformers
    renames on loading; tied parameters are stored once. Weights that the checkpoint stores as (K, N) are (N, K) here.

    read       gives a tensor by its name in the checkpoint
    stored     whether the checkpoint has a tensor of this name
    unpacked   names in the checkpoint for which `read` gives (N, K), whatever the checkpoint stores
    expect     may start to read tensors that are needed next
    quantized  whether a tensor of the checkpoint is quantized
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
        self.stored_dtypes: dict[str, torch.dtype] = {}  # of each filled parameter, by its name in the model
        self._read = read
        self._stored = stored
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))  # from the configuration
        self._renamings = _renamings(model)
        self._transposed = conv1d.transposed_names(model)
        self._unpacked = unpacked
        self._quantized = quantized
        self.merged_into: dict[str, str] = {}  # name in the checkpoint -> the parameter that the tensor is part of
        self._merged: dict[str, Callable[[], Tensor]] = {}
        self._sources: dict[str, list[str]] = {}  # of a merged parameter, or of one that is a part of a tensor
        self._split: set[str] = set()
        self._places: dict[str, str] = {}
        self.stacked_in: dict[str, str] = {}  # name of an expert's tensor -> the stored tensor that it is part of
        self._parts: Counter[str] = Counter()

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that will be read next, by their names in the checkpoint."""
        if self._expect is not None:
            self._expect(names)

    def place(self, names: Mapping[str, str]) -> None:
        """Set the names of modules in the checkpoint: path in the model -> name in the checkpoint."""
        self._places |= names

    def provide(self, tensors: Mapping[str, Callable[[], Tensor]], stacked_in: Mapping[str, str]) -> None:
        """Add tensors that the checkpoint stores as parts of stacked tensors."""
        read, stored = self._read, self._stored
        self._read = lambda name: tensors[name]() if name in tensors else read(name)
        self._stored = lambda name: name in tensors or stored(name)
        self.stacked_in |= stacked_in
        self._parts.update(stacked_in.values())

    def merge(self, name: str, sources: Iterable[str], read: Callable[[], Tensor], *, part: bool = False) -> None:
        """Read a parameter with `read`, which merges the tensors `sources`, or takes a `part` of one."""
        self._merged[name], self._sources[name] = read, list(sources)
        self.merged_into |= dict.fromkeys(self._sources[name], name)
        if part:
            self._split.add(name)

    def is_part(self, name: str) -> bool:
        """Whether the checkpoint stores the parameter as a part of a tensor with other parameters."""
        return name in self._split

    def is_converted(self, name: str) -> bool:
        """Whether a weight is made of tensors of another form, or stored under a name without `.weight`."""
        stored = self.stored_name(name) or name
        return name in self._merged or not stored.endswith(".weight")

    def parts_of(self, stacked: str) -> int:
        """The number of parts of a stacked tensor, all of the same size."""
        return self._parts[stacked]

    def stored_name(self, name: str) -> str | None:
        """The name of a parameter in the checkpoint; None if it is not stored."""
        return next((candidate for candidate in self.candidates(name) if self._stored(candidate)), None)

    def left_stacked(self, name: str, packed: Container[str]) -> bool:
        """Whether an expert's tensor is written as part of a stacked tensor: if its module is not in `packed`."""
        return name in self.stacked_in and name.rpartition(".")[0] not in packed

    def tensor_name(self, name: str) -> str:
        """The name in the checkpoint of a parameter or one that it is tied to; raises CheckpointError if missing."""
        for candidate in [*self.candidates(name), *self.candidates(self._tied.get(name, name))]:
            if self._stored(candidate):
                return candidate
        raise CheckpointError(
            f"the model needs the tensor {name}, which the checkpoint does not hold",
            hint="check that the checkpoint is complete and that config.json belongs to it",
        )

    def refuse_stacked(self, name: str, parameter: Tensor) -> None:
        """Raise UnsupportedModelError for experts that are one tensor in the model and separate in the checkpoint."""
        if parameter.dim() > 2 and self.lacks(name):
            raise UnsupportedModelError(
                f"{name} is a stack of weights {tuple(parameter.shape)}, which the checkpoint stores separately in a "
                "way that llmq does not know",
                hint="please report the architecture",
            )

    def module_name(self, path: str) -> str:
        """The name of the module at `path` in the checkpoint; `path` itself if it has no weight there."""
        stored = (candidate for candidate in self.candidates(path) if self._stored(f"{candidate}.weight"))
        return next(stored, path)

    def is_tied(self, name: str) -> bool:
        """Whether the parameter is stored only under the name of a parameter that it is tied to."""
        return name in self._tied and not any(self._stored(candidate) for candidate in self.candidates(name))

    def is_borrowed(self, name: str) -> bool:
        """Whether the parameter has no tensor in the checkpoint for itself: it is tied, or merged from several."""
        return name in self._merged or self.is_tied(name)

    def is_quantized(self, name: str) -> bool:
        """Whether the parameter, or one of the tensors that it is merged from, is quantized in the checkpoint."""
        if name in self._merged:
            return any(self._quantized(source) for source in self._sources[name])
        stored = self.tensor_name(name)
        return self._quantized(self.stacked_in.get(stored, stored))

    def is_shared(self, name: str) -> bool:
        """Whether the parameter is tied to another one, whichever of them is stored."""
        return name in self._tied or name in self._tied.values()

    def is_fixed(self, name: str) -> bool:
        """Whether the parameter cannot be changed without changing others."""
        return self.is_borrowed(name) or self.is_shared(name)

    def lacks(self, name: str) -> bool:
        """Whether the parameter cannot be read: it is not stored, tied or merged."""
        return name not in self._merged and name not in self._tied and self.stored_name(name) is None

    def candidates(self, name: str) -> list[str]:
        """The possible names of the parameter or module `name` in the checkpoint."""
        for known in (name, name.rpartition(".")[0]):
            if known in self._places:
                return [self._places[known] + name[len(known) :]]
        renamed = f"{name}."  # the dot lets a renaming of `lm_head.` fit the module too
        for renaming in self._renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        return [name, name.removeprefix(self._prefix), self._prefix + name, renamed.removesuffix(".")]

    def fill(self, path: str, module: nn.Module, device: torch.device) -> None:
        """Fill the direct parameters and the stored buffers of a module, in their dtypes on meta."""
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
        """The tensor of a parameter, with the dtype of the checkpoint and the shape of the model."""
        if name in self._merged:
            return self._merged[name]()
        stored = self.tensor_name(name)
        return self._read(stored) if stored in self._unpacked else self.turned(name, self._read(stored))

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor by its name in the checkpoint."""
        return self._read(name)

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """Transpose a tensor if the checkpoint stores it as (K, N) and the model as (N, K), or back."""
        return tensor.T.contiguous() if name in self._transposed else tensor

    def _checked(self, name: str, parameter: Tensor) -> Tensor:
        tensor = self.original(name)
        self.stored_dtypes[name] = tensor.dtype
        require_shape(name, tuple(tensor.shape), tuple(parameter.shape))
        return tensor


def _renamings(model: nn.Module) -> list[Any]:
    """The renamings of parameters on saving with transformers, such as `lm_head.` to `embed_out.` (GPT-NeoX)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    loading = get_model_conversion_mapping(model, add_legacy=False)
    kept = [step for step in loading if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange)]
    return [step.reverse_transform() for step in reversed(kept)]


def require_shape(
    name: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    hint: str = "check that config.json belongs to these weights",
) -> None:
    """Raise CheckpointError for a tensor that does not have the shape of its parameter."""
    if shape != expected:
        raise CheckpointError(f"{name} has the shape {shape}, expected {expected} by the configuration", hint=hint)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor, of any dtype, holds NaN or Inf."""
    if tensor.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.to(torch.float32)  # torch.isfinite does not support 8-bit floats
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise CheckpointError(
            f"{name} has {int((~finite).sum())} values that are NaN or infinite, expected finite values",
            hint="the checkpoint is damaged, or its training diverged; get another one",
        )
