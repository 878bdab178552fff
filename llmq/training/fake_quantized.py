"""A linear layer whose weight is trained on its grid: its forward computes with exactly the values of the file.

    ŵ = s (q - z),    q = clip(round(q₀ + v)),    s = s₀ (1 + θ), rounded to the dtype that the file stores

q₀, s₀ and z are the codes, scales and zero points at the start. The parameters are `offset` = v (N, K), in steps of the
grid, and `stretch` = θ (N, G); gradients pass straight through both roundings. The maths is that of
`algorithms/kl_tuning.py`; this file makes it a module for any optimizer and trainer.

Inputs are rounded as the file declares (`numerics/fake_quantize.py`).

Both parameters are 0 if nothing is known, and weight decay pulls them towards the start. Their scale does not depend on
the model, so one learning rate is good for all layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.algorithms import kl_tuning
from llmq.algorithms.kl_tuning import Rates
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme, Scheme

BOTH_PARTS = Rates(rounding=1.0, scales=1.0)  # which parts of a state are made; the numbers are not used


class FakeQuantizedLinear(nn.Linear):
    """y = x ŵᵀ + bias; the gradient reaches `offset` and `stretch`.

    codes        (N, K) uint8, q₀
    scale_bytes  (N, G * bytes) uint8: the bytes of s₀, because casting a model (`.half()`) must not change them
    zeros        (N, G) int32, or None; group_index (K,) int32, or None: see `QuantizedTensor`
    """

    codes: Tensor
    scale_bytes: Tensor
    zeros: Tensor | None
    group_index: Tensor | None

    def __init__(
        self,
        quantized: QuantizedTensor,
        reference: Tensor | None,
        bias: Tensor | None,
        inputs: InputScheme | None = None,
    ) -> None:
        """Start at `quantized`, with v at the place of the float weight `reference` (N, K), if it is known."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.scheme, self._scale_dtype = quantized.scheme, quantized.scales.dtype
        self.inputs, self._rounding = inputs, None if inputs is None else rounding_for(inputs)
        self.register_buffer("codes", quantized.codes)
        scales = quantized.scales.clone(memory_format=torch.contiguous_format)
        self.register_buffer("scale_bytes", scales.view(torch.uint8))
        zeros = None if quantized.zeros is None else quantized.zeros.to(torch.int32)  # processes exchange no int16
        self.register_buffer("zeros", zeros)
        self.register_buffer("group_index", quantized.group_index)
        state = kl_tuning.start(quantized, reference, BOTH_PARTS)
        assert state.rounding is not None and state.scales is not None
        self.offset = nn.Parameter(state.rounding.value)
        one_scale = quantized.scheme.group_size == "tensor"  # repeated in every row, so rows must not differ
        self.stretch = nn.Parameter(state.scales.value, requires_grad=not one_scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def origin(self) -> QuantizedTensor:
        """The weight at the start."""
        zeros = None if self.zeros is None else self.zeros.to(torch.int16)
        return QuantizedTensor(
            self.codes, self.scale_bytes.view(self._scale_dtype), zeros, self.scheme, self.group_index
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K) float32, the weight as the file will hold it; differentiable."""
        weight: Tensor = _FakeQuantize.apply(self.offset, self.stretch, self.origin)  # type: ignore[no-untyped-call]
        return weight

    def quantized(self) -> QuantizedTensor:
        """The trained weight: its values are those of `weight`."""
        with torch.no_grad():
            return kl_tuning.quantized(self.origin, self.offset, self.stretch)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        x = input if self._rounding is None else self._rounding(input)
        return functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {Scheme(self.scheme, self.inputs)}"


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, offset: Tensor, stretch: Tensor, origin: QuantizedTensor) -> Tensor:
        context.save_for_backward(offset, stretch)
        context.origin = origin
        return kl_tuning.quantized(origin, offset, stretch).dequantize()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        offset, stretch = context.saved_tensors
        of_offset, of_stretch = kl_tuning.slopes(context.origin, offset, stretch, gradient.to(torch.float32))
        return of_offset, of_stretch, None
