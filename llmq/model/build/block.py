"""One decoder block: its parameters come from disk for its turn and go when it is done."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from llmq.model.build.checkpoint_names import ModelWeights, require_finite
from llmq.model.build.input_rounding import InputRounding
from llmq.model.experts.separate import SeparateExperts
from llmq.numerics.scheme import InputScheme


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and no more; a router may be a subclass that returns something else."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    weight = module.weight  # a forward of its own: see what it makes, on meta, where that costs nothing
    try:
        output = module(torch.empty(1, module.in_features, device=weight.device, dtype=weight.dtype))
    except Exception:  # it may do anything, and wants something else
        return False
    return isinstance(output, Tensor) and output.shape == (1, module.out_features)


@dataclass(frozen=True)
class Call:
    """What a block is called with: its hidden state (B, T, D) is the first of `args`, or `kwargs["hidden_states"]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def with_hidden(self, hidden: Tensor) -> "Call":
        """The same call on another hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": hidden})


class Block:
    """Block number `index` of a `Skeleton`; `path` is where it is in the model, such as `model.layers.3`.

    `linears` maps the path of each linear layer that may be quantized, such as `model.layers.3.mlp.up_proj`, to its
    module; `experts` those of modules of experts, whose weights are among the linear layers.  `inputs` says which of
    them get rounded inputs (`quantize_inputs`); every pass runs the block through `forward`, so every pass sees them.
    """

    def __init__(self, index: int, path: str, module: nn.Module, weights: ModelWeights, device: torch.device) -> None:
        self.index = index
        self.path = path
        self.module = module
        self._weights = weights
        self._device = device
        self._originals: dict[str, Tensor] = {}
        self.linears = {f"{path}.{name}": m for name, m in module.named_modules() if is_plain_linear(m)}
        self.experts = {f"{path}.{name}": m for name, m in module.named_modules() if isinstance(m, SeparateExperts)}
        self.inputs = InputRounding()

    def leave(self, paths: Container[str]) -> None:
        """Forget these linear layers: they are parameters like any other now."""
        self.linears = {path: linear for path, linear in self.linears.items() if path not in paths}

    def is_experts(self, linear: str) -> bool:
        """Whether a linear layer, by its path, belongs to an expert."""
        return linear.startswith(tuple(f"{path}." for path in self.experts))

    def quantize_inputs(self, schemes: Mapping[str, InputScheme]) -> None:
        """Round the inputs of these linear layers, by path, from now on; those of all others are float.

        Raises ConfigError for a scheme that cannot be simulated, and for experts of one layer that differ in it.
        """
        self.inputs.apply(schemes, self.linears, self.experts)

    def as_fed(self, path: str, inputs: Tensor) -> Tensor:
        """What the linear layer at `path` multiplies where `inputs` (…, K) arrive: rounded, if it has a scheme."""
        return self.inputs.as_fed(path, inputs)

    def float_inputs(self) -> AbstractContextManager[None]:
        """While open, no input is rounded: for the float model, and to find out how the block is built."""
        return self.inputs.off()

    @property
    def float_bytes(self) -> int:
        """What the parameters of the block take in float32."""
        return sum(4 * parameter.numel() for parameter in self.module.parameters())

    def load(self) -> None:
        """Read every parameter of the block from the checkpoint; raises CheckpointError for one with NaN or Inf."""
        for name, module in self.module.named_modules():
            self._weights.fill(f"{self.path}.{name}" if name else self.path, module, self._device)
        for name, parameter in self.module.named_parameters():
            require_finite(f"{self.path}.{name}", parameter)

    def fill(self, read: Callable[[str], Tensor], unpacked: Container[str] = ()) -> None:
        """Put what `read` gives for its name in the checkpoint behind every parameter of the block's own.

        What it shares with others, or is made of several tensors, is read from the model's checkpoint as ever.  Those
        in `unpacked` it gives as (N, K), the others as the checkpoint stores them.
        """
        for path, module in self.module.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{path}.{key}" if path else key
                    tensor = self._read(name, read, unpacked)
                    real = tensor.to(self._device, parameter.dtype)
                    module._parameters[key] = nn.Parameter(real, requires_grad=False)

    def free(self) -> None:
        """Give the memory of the block's parameters back."""
        self._originals = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @torch.no_grad()
    def run(self, call: Call) -> Tensor:
        """The block's hidden state (B, T, D) for one recorded call."""
        return self.forward(call)

    def forward(self, call: Call) -> Tensor:
        """The same in whatever mode torch is in, so that there may be gradients.

        The one place where a block runs: inputs that have a scheme are rounded here, by hooks on the linear layers.
        """
        output = self.module(*call.args, **call.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
        return hidden

    def weight(self, path: str) -> Tensor:
        """The weight of a linear layer, (N, K) float32, a copy."""
        return self.linears[path].weight.detach().to(torch.float32, copy=True)

    def set_weight(self, path: str, weight: Tensor) -> None:
        """Replace the weight of a linear layer by `weight` (N, K)."""
        self.linears[path].weight.data.copy_(weight)

    def keep_originals(self) -> None:
        """Remember every parameter as it is now; see `originals`."""
        self._originals = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}

    @contextmanager
    def originals(self) -> Iterator[None]:
        """While open, the block is the float model's: the parameters that `keep_originals` found, and float inputs.

        Nothing may change the parameters meanwhile.
        """
        exchanged = [(p, p.data, self._originals[name]) for name, p in self.module.named_parameters()]
        for parameter, _, original in exchanged:
            parameter.data = original
        try:
            with self.float_inputs():
                yield
        finally:
            for parameter, current, _ in exchanged:
                parameter.data = current

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the checkpoint stores a parameter in; `name` as below the block: `input_layernorm.weight`."""
        return self._weights.stored_dtypes[f"{self.path}.{name}"]

    def stored_names(self) -> list[str]:
        """The checkpoint's name of each parameter of the block's own."""
        return [self._stored_name(name) for name, _ in self._own_parameters()]

    def stored_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the block's own as the checkpoint names and stores it."""
        stored = {}
        for name, parameter in self._own_parameters():
            dtype = self.stored_dtype(name)
            if parameter.dtype.itemsize < dtype.itemsize:  # a block that runs in fewer bits is never rewritten
                tensor = self._weights.original(f"{self.path}.{name}")
            else:
                tensor = parameter.detach().to(dtype)
            stored[self._stored_name(name)] = self._turned(name, tensor)
        return stored

    def set_stored_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over those of `tensors` (by their names in the checkpoint) that are parameters of the block."""
        for name, parameter in self._own_parameters():
            if self._stored_name(name) in tensors:
                parameter.data.copy_(self._turned(name, tensors[self._stored_name(name)]))

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that the checkpoint holds by themselves, for this block."""
        borrowed = self._weights.is_borrowed
        return [(name, p) for name, p in self.module.named_parameters() if not borrowed(f"{self.path}.{name}")]

    def _read(self, name: str, read: Callable[[str], Tensor], unpacked: Container[str]) -> Tensor:
        weights, full = self._weights, f"{self.path}.{name}"
        if weights.is_borrowed(full):
            return weights.original(full)
        stored = self._stored_name(name)
        return read(stored) if stored in unpacked else self._turned(name, read(stored))

    def _stored_name(self, name: str) -> str:
        return self._weights.tensor_name(f"{self.path}.{name}")

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        return self._weights.turned(f"{self.path}.{name}", tensor)
