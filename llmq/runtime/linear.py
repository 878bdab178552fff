"""A linear layer whose weight stays packed in memory, whatever its bit width, and runs through one op."""

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.quantized import QuantizedTensor
from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16 import op as _op  # noqa: F401  (registers llmq::w4a16_linear)


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias with W (N, K) held as `words` (N, Kp / 16 * bits) int16, scales (G, N), zeros (G, N) or None.

    Codes of a foreign checkpoint whose columns are grouped by activation order are stored group by group, with
    `column_order` (K,) saying which input belongs to which column.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    column_order: Tensor | None

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.scheme = quantized.scheme
        self.columns_per_group = quantized.scheme.columns_per_group(self.in_features)
        codes, order = quantized.codes, _column_order(quantized)
        if order is not None:
            codes = codes[:, order]
        self.register_buffer("words", layout.pack(codes, quantized.scheme.bits))
        self.register_buffer("scales", quantized.scales.T.contiguous())
        self.register_buffer("zeros", None if quantized.zeros is None else quantized.zeros.T.contiguous())
        self.register_buffer("column_order", order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.llmq.w4a16_linear(
            x, self.words, self.scales, self.zeros, self.bias, self.column_order,
            self.scheme.bits, self.in_features, self.columns_per_group,
        )  # fmt: skip
        return product

    def quantized(self) -> QuantizedTensor:
        """The weight that the layer was made from, code for code."""
        codes = layout.unpack(self.words, self.scheme.bits, self.in_features)
        group_index = None
        if self.column_order is not None:
            groups = torch.arange(self.in_features, device=codes.device) // self.columns_per_group
            group_index = torch.empty_like(groups, dtype=torch.int32)
            group_index[self.column_order] = groups.to(torch.int32)
            restored = torch.empty_like(codes)
            restored[:, self.column_order] = codes
            codes = restored
        zeros = None if self.zeros is None else self.zeros.T.contiguous()
        return QuantizedTensor(codes, self.scales.T.contiguous(), zeros, self.scheme, group_index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def _column_order(quantized: QuantizedTensor) -> Tensor | None:
    """(K,) int64 that lays the columns of each group side by side, or None where they lie so already."""
    if quantized.group_index is None:
        return None
    order = torch.argsort(quantized.group_index.long(), stable=True)
    per_group = quantized.scheme.columns_per_group(len(order))
    expected = torch.arange(len(order), device=order.device) // per_group
    if not torch.equal(quantized.group_index.long()[order], expected):
        raise FormatError(
            f"g_idx does not give every group {per_group} columns", hint="the checkpoint is damaged or not GPTQ"
        )
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
