"""The `weight` of a packed layer: shape, dtype and device at no cost, values on demand.

Other programs read the weight of a linear layer, mostly for its dtype or device. Some need the values, such as an
adapter that scales rows by their norms. A view returns the former without work, and dequantizes in every operation that
needs the values. Operations that would change the weight raise an error: a packed weight cannot be changed in place,
and a change of the dequantized copy would be lost silently.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from llmq.errors import UnsupportedModelError
from llmq.numerics.quantized_tensor import QuantizedTensor


class PackedLayer(Protocol):
    """The layer of a view."""

    in_features: int
    out_features: int

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def quantized(self) -> QuantizedTensor: ...


class WeightView(Tensor):
    """(N, K), without memory for the values."""

    _layer: PackedLayer

    @staticmethod
    def of(layer: Any) -> "WeightView":
        """The view of a `PackedLinear` or `FusedLinear`."""
        device = next(layer.buffers()).device
        view: WeightView = Tensor._make_wrapper_subclass(
            WeightView, (layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=device
        )
        view._layer = layer
        return view

    @property
    def data(self) -> "WeightView":
        """The same view."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _unchangeable()

    def dequantized(self) -> Tensor:
        """(N, K) in the view's dtype."""
        return self._layer.quantized().dequantize().to(self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise _unchangeable()

        def real(value: Any) -> Any:
            return value.dequantized() if isinstance(value, WeightView) else value

        return func(*tree_map(real, args), **tree_map(real, dict(kwargs or {})))


def _unchangeable() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the weight of a packed layer cannot be changed",
        hint="keep adapters separate (and save them separately), or merge them into the float model and quantize that",
    )
