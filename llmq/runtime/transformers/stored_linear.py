"""Layers that hold the tensors of a packed weight exactly as the checkpoint stores them, with the same names.

transformers loads a model by the names of its parameters: it reads each from the files and moves it to the requested
device, or leaves it on disk. During loading, a `StoredLinear` is the placeholder of a packed layer; afterwards a
`PackedLinear` replaces it. If that is impossible, because accelerate offloads the tensors or because the weight is not
on an integer grid, the `StoredLinear` is kept. It dequantizes in every call, which is correct but slow.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.runtime.packed_linear import PackedLinear


@dataclass(frozen=True)
class _Overlaid(Checkpoint):
    """A checkpoint with some tensors in memory, on any device; all others are read from its files."""

    at_hand: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, name: str) -> Tensor:
        return self.at_hand[name] if name in self.at_hand else super().tensor(name)


class Source:
    """The checkpoint of a model, and a reader for its weights that are already loaded.

    Raises FormatError for a quantization_config that llmq cannot read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files = PackedWeights(checkpoint)
        self._overlaid = _Overlaid(checkpoint.folder, checkpoint.config, checkpoint.files, checkpoint._tensors)
        self._at_hand = PackedWeights(self._overlaid)
        self.modules = frozenset(self.files.modules)

    def __deepcopy__(self, memo: object) -> "Source":
        return self  # copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.checkpoint,)

    @contextmanager
    def at_hand(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[PackedWeights]:
        """The packed weights, where module `name` has these tensors, by the suffixes of their names."""
        self._overlaid.at_hand.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        try:
            yield self._at_hand
        finally:
            self._overlaid.at_hand.clear()

    def suffixes(self, name: str) -> list[str]:
        """The suffixes of the tensors of a packed module, in the order of the checkpoint, without the bias."""
        return self.files.suffixes_of(name)


class StoredLinear(nn.Module):
    """y = x Wᵀ + bias with W (N, K) held as the tensors of the checkpoint; on meta until they are loaded.

    name  of the module in the checkpoint
    """

    bias: nn.Parameter | None

    def __init__(self, source: Source, name: str, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.compute_dtype = dtype
        self.out_features, self.in_features = source.files.shape(name)
        self.inputs = source.files.inputs(name)
        self._source = source
        self._suffixes = source.suffixes(name)
        stored = [*self._suffixes, "bias"] if bias else self._suffixes
        for suffix in stored:
            if f"{name}.{suffix}" not in source.checkpoint:
                raise CheckpointError(f"the checkpoint has no {name}.{suffix}", hint="copy the checkpoint again")
            info = source.checkpoint.info(f"{name}.{suffix}")
            empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        if not bias:
            self.register_parameter("bias", None)

    @property
    def is_loaded(self) -> bool:
        """Whether the tensors are loaded, and not offloaded."""
        return not any(parameter.is_meta for parameter in self.parameters())

    def forward(self, input: Tensor) -> Tensor:
        x = input  # named as in nn.Linear, so that it can be given by its keyword
        with self._source.at_hand(self.name, self._tensors()) as packed:
            weight = packed.weight(self.name).to(x.dtype)  # (N, K)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = x if self.inputs is None else rounding_for(self.inputs)(x)
        return functional.linear(x, weight, bias)

    @property
    def is_affine(self) -> bool:
        """Whether the weight is on an integer grid."""
        return self._source.files.is_affine(self.name)

    def quantized(self) -> QuantizedTensor:
        """The loaded weight; raises FormatError if it is not affine."""
        with self._source.at_hand(self.name, self._tensors()) as packed:
            return packed.read(self.name)

    def packed(self) -> PackedLinear | None:
        """The packed layer, or None if the weight is not on an integer grid or is offloaded."""
        if not (self.is_loaded and self.is_affine):
            return None
        return PackedLinear(self.quantized(), self.bias, self.compute_dtype, self.inputs)

    def _tensors(self) -> dict[str, Tensor]:
        return {suffix: self.get_parameter(suffix).detach() for suffix in self._suffixes}

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, stored as {', '.join(self._suffixes)}"
