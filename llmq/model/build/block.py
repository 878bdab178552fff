"""One decoder block, whose parameters are in memory only while it is processed."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from llmq.model.build.checkpoint_names import ModelWeights, require_finite
from llmq.model.build.input_rounding import InputRounding
from llmq.model.build.layout import Layout
from llmq.model.experts.separate import SeparateExperts
from llmq.numerics.scheme import InputScheme


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module behaves like `nn.Linear`; a router may be a subclass that returns something else."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    weight = module.weight  # it overrides forward: look at its output, on meta, where this costs nothing
    try:
        output = module(torch.empty(1, module.in_features, device=weight.device, dtype=weight.dtype))
    except Exception:  # an unknown forward may raise anything, for example if it takes other arguments
        return False
    return isinstance(output, Tensor) and output.shape == (1, module.out_features)


@dataclass(frozen=True)
class Call:
    """The arguments of a block; the first of `args`, or `kwargs["hidden_states"]`, is `raw`, its hidden state.

    Hidden states are converted here and in `Block`, so that all other code has (…, B, T, D).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout = Layout.BATCH_FIRST

    @property
    def raw(self) -> Tensor:
        """The hidden state as the module takes it."""
        raw: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return raw

    @property
    def hidden(self) -> Tensor:
        """The hidden state (…, B, T, D)."""
        return self.layout.stored(self.raw)

    def with_hidden(self, hidden: Tensor) -> "Call":
        """The same call with another hidden state (…, B, T, D)."""
        raw = self.layout.raw(hidden)
        if self.args:
            return replace(self, args=(raw, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": raw})


class Block:
    """Block number `index` of a `Skeleton`; `path` is its path in the model, such as `model.layers.3`.

    linears  path -> module, of each linear layer that may be quantized, such as `model.layers.3.mlp.up_proj`
    experts  path -> module, of each layer of experts; their linear layers are in `linears`, too
    layout   the order of the dimensions of hidden states in the module
    inputs   which linear layers get quantized inputs (`quantize_inputs`). Every pass runs the block with `forward`, so
             every pass uses them
    """

    def __init__(self, index: int, path: str, module: nn.Module, weights: ModelWeights, device: torch.device) -> None:
        self.index = index
        self.path = path
        self.layout = Layout.BATCH_FIRST
        self.module = module
        self._weights = weights
        self._device = device
        self._originals: dict[str, Tensor] = {}
        self.linears = {f"{path}.{name}": m for name, m in module.named_modules() if is_plain_linear(m)}
        self.experts = {f"{path}.{name}": m for name, m in module.named_modules() if isinstance(m, SeparateExperts)}
        self.inputs = InputRounding()

    def leave(self, paths: Container[str]) -> None:
        """Remove these linear layers from `linears`: they will not be quantized."""
        self.linears = {path: linear for path, linear in self.linears.items() if path not in paths}

    def is_experts(self, linear: str) -> bool:
        """Whether a linear layer, by its path, belongs to an expert."""
        return linear.startswith(tuple(f"{path}." for path in self.experts))

    def quantize_inputs(self, schemes: Mapping[str, InputScheme]) -> None:
        """From now on, quantize the inputs of these linear layers, by path; all other inputs are float.

        Raises ConfigError for a scheme that cannot be simulated, and for experts of one layer with different schemes.
        """
        self.inputs.apply(schemes, self.linears, self.experts)

    def as_fed(self, path: str, inputs: Tensor) -> Tensor:
        """`inputs` (…, K) as the linear layer at `path` multiplies them: quantized, if it has an input scheme."""
        return self.inputs.as_fed(path, inputs)

    def float_inputs(self) -> AbstractContextManager[None]:
        """While open, no input is quantized: for the float model, and to analyse the block."""
        return self.inputs.off()

    @property
    def float_bytes(self) -> int:
        """Bytes of the block's parameters in float32."""
        return sum(4 * parameter.numel() for parameter in self.module.parameters())

    def load(self) -> None:
        """Read every parameter of the block from the checkpoint; raises CheckpointError for one with NaN or Inf."""
        for name, module in self.module.named_modules():
            self._weights.fill(f"{self.path}.{name}" if name else self.path, module, self._device)
        for name, parameter in self.module.named_parameters():
            require_finite(f"{self.path}.{name}", parameter)

    def fill(self, read: Callable[[str], Tensor], unpacked: Container[str] = ()) -> None:
        """Fill every parameter that the checkpoint stores for this block alone with `read(name in the checkpoint)`.

        Parameters that are shared with other modules, or merged from several tensors, are read from the checkpoint.
        `read` returns the tensors in `unpacked` as (N, K), and all others as the checkpoint stores them.
        """
        for path, module in self.module.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{path}.{key}" if path else key
                    tensor = self._read(name, read, unpacked)
                    real = tensor.to(self._device, parameter.dtype)
                    module._parameters[key] = nn.Parameter(real, requires_grad=False)

    def free(self) -> None:
        """Free the memory of the block's parameters."""
        self._originals = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @torch.no_grad()
    def run(self, call: Call) -> Tensor:
        """The output of the block (B, T, D) for one recorded call, without gradients."""
        return self.forward(call)

    def forward(self, call: Call) -> Tensor:
        """The output of the block (B, T, D) for one recorded call, with gradients if torch's grad mode is on.

        Blocks are run only here, so hooks on the linear layers quantize inputs in every pass.
        """
        output = self.module(*call.args, **call.kwargs)
        return call.layout.stored(output[0] if isinstance(output, tuple | list) else output)

    def weight(self, path: str) -> Tensor:
        """A float32 copy of the weight (N, K) of a linear layer."""
        return self.linears[path].weight.detach().to(torch.float32, copy=True)

    def set_weight(self, path: str, weight: Tensor) -> None:
        """Replace the weight of a linear layer by `weight` (N, K)."""
        self.linears[path].weight.data.copy_(weight)

    def keep_originals(self) -> None:
        """Save a copy of every parameter, for `originals`."""
        self._originals = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}

    @contextmanager
    def originals(self) -> Iterator[None]:
        """While open, the block is the float block: with the parameters that `keep_originals` saved, and float inputs.

        The parameters must not be changed while it is open.
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
        """The dtype of a parameter in the checkpoint; `name` is relative to the block: `input_layernorm.weight`."""
        return self._weights.stored_dtypes[f"{self.path}.{name}"]

    def stored_names(self) -> list[str]:
        """The name in the checkpoint of each parameter that is stored for this block alone."""
        return [self._stored_name(name) for name, _ in self._own_parameters()]

    def stored_parameters(self) -> dict[str, Tensor]:
        """Every parameter that is stored for this block alone, with the name, shape and dtype of the checkpoint."""
        stored = {}
        for name, parameter in self._own_parameters():
            dtype = self.stored_dtype(name)
            if parameter.dtype.itemsize < dtype.itemsize:  # no transform changes a block that runs in fewer bits
                tensor = self._weights.original(f"{self.path}.{name}")
            else:
                tensor = parameter.detach().to(dtype)
            stored[self._stored_name(name)] = self._turned(name, tensor)
        return stored

    def set_stored_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy those of `tensors`, by their names in the checkpoint, that are parameters of this block."""
        for name, parameter in self._own_parameters():
            if self._stored_name(name) in tensors:
                parameter.data.copy_(self._turned(name, tensors[self._stored_name(name)]))

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the checkpoint stores as separate tensors for this block."""
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
