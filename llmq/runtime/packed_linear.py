"""A linear layer whose weight stays packed in memory, whatever its bit width, and runs through one op."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.weight_view import WeightView
from llmq_kernels.w4a16 import int4pack, layout
from llmq_kernels.w4a16 import op as packed
from llmq_kernels.w4a16.packed_weight import PackedWeight


class PackedRows(nn.Module):
    """y = x Wᵀ + bias with W (N, K) held as `words` (N, Kp / 16 * bits) int16, scales (G, N), zeros (G, N) or None.

    Codes of a foreign checkpoint whose columns are grouped by activation order are stored group by group, with
    `column_order` (K,) saying which input belongs to which column.

    On a CPU, `prepare` adds a second copy of 4-bit codes, `int4_words` and `int4_grid`, with which few rows of x run
    several times quicker, in bfloat16 (see `llmq_kernels/w4a16/int4pack.py`).  It is never saved, and made again where
    the weight moves or changes.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    column_order: Tensor | None
    int4_words: Tensor | None
    int4_grid: Tensor | None

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        codes, order = quantized.codes, _column_order(quantized)
        if order is not None:
            codes = codes[:, order]
        zeros = None if quantized.zeros is None else quantized.zeros.T.contiguous()
        words = layout.pack(codes, quantized.scheme.bits)
        self._hold(quantized.scheme, quantized.shape[1], words, quantized.scales.T.contiguous(), zeros, order, bias)
        self.compute_dtype = dtype or quantized.scales.dtype

    @classmethod
    def stacked(cls, layers: Sequence["PackedRows"]) -> "PackedRows":
        """One layer with the rows of several, in their order; the buffers are new.

        They must have the same bits, columns in a group, dtype of scales, and order of columns.  Where only some have
        zeros, the others' are written out, 2**(bits - 1); where only some have a bias, the others' is 0.
        """
        first, zeros, bias = layers[0], None, None
        scheme = first.scheme
        if any(layer.zeros is not None for layer in layers):
            scheme = replace(scheme, symmetric=False)
            zeros = torch.cat([layer._written_zeros() for layer in layers], dim=1)  # (G, N)
        with_bias = next((layer.bias for layer in layers if layer.bias is not None), None)
        if with_bias is not None:
            parts = (with_bias.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers)
            bias = torch.cat(list(parts))
        words, scales = torch.cat([layer.words for layer in layers]), torch.cat([x.scales for x in layers], dim=1)
        stacked = cls.__new__(cls)
        nn.Module.__init__(stacked)
        stacked._hold(scheme, first.in_features, words, scales, zeros, first.column_order, bias)
        stacked.compute_dtype = first.compute_dtype
        return stacked

    def _hold(
        self,
        scheme: WeightScheme,
        in_features: int,
        words: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        column_order: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.out_features, self.in_features = words.shape[0], in_features
        self.scheme = scheme
        self.columns_per_group = scheme.columns_per_group(in_features)
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("column_order", column_order)
        self.register_buffer("int4_words", None, persistent=False)
        self.register_buffer("int4_grid", None, persistent=False)
        self.prepared = False
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _written_zeros(self) -> Tensor:
        """(G, N) int16 even where they are all in the middle."""
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, self.scheme.middle, dtype=torch.int16)

    def forward(self, x: Tensor) -> Tensor:
        return packed.linear(x, self._packed_weight(), self.bias)

    def _packed_weight(self) -> PackedWeight[Tensor]:
        held: Any = self._buffers  # the attribute lookup of nn.Module is slow, and this runs in every call
        return PackedWeight(
            held["words"], held["scales"], held["zeros"], self.scheme.bits, self.in_features, self.columns_per_group,
            held["column_order"], held["int4_words"], held["int4_grid"],
        )  # fmt: skip

    def prepare(self) -> None:
        """Make what the device runs quicker with, where there is any; loading calls it when all layers are in place."""
        self.prepared = True
        pair = int4pack.prepare(self._packed_weight())
        self.int4_words, self.int4_grid = pair or (None, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedRows":
        """Moves and casts: `.to`, `.half` and the like.  The pair is no tensor to cast, and other devices have none.

        The scales move and are not cast, for which they pass as integers.
        """
        pair, before = (self.int4_words, self.int4_grid), self._sources()
        self.int4_words = self.int4_grid = None
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        dtype = self.scales.dtype
        self.scales = self.scales.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self.scales.view(dtype)
        if self.prepared and self._sources() != before:
            self.prepare()
        else:
            self.int4_words, self.int4_grid = pair
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.prepared:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a file, has no pair: another processor may read it."""
        return {**self.__dict__, "_buffers": {**self._buffers, "int4_words": None, "int4_grid": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.prepared:
            self.prepare()

    def _sources(self) -> list[tuple[int, torch.dtype, torch.device]]:
        """Tells whether what the pair was made from is still the same memory."""
        return [(t.data_ptr(), t.dtype, t.device) for t in (self.words, self.scales, self.zeros) if t is not None]

    def quantized(self, rows: slice = slice(None)) -> QuantizedTensor:
        """The weight that the layer was made from, code for code; or some of its rows."""
        codes = layout.unpack(self.words[rows], self.scheme.bits, self.in_features)
        group_index = None
        if self.column_order is not None:
            groups = torch.arange(self.in_features, device=codes.device) // self.columns_per_group
            group_index = torch.empty_like(groups, dtype=torch.int32)
            group_index[self.column_order] = groups.to(torch.int32)
            restored = torch.empty_like(codes)
            restored[:, self.column_order] = codes
            codes = restored
        zeros = None if self.zeros is None else self.zeros[:, rows].T.contiguous()
        return QuantizedTensor(codes, self.scales[:, rows].T.contiguous(), zeros, self.scheme, group_index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class PackedLinear(PackedRows, nn.Linear):  # type: ignore[misc]  # a layer may have no bias
    """The rows as a layer of a model: an `nn.Linear` to whoever asks, such as PEFT, which puts adapters beside it."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K) in `compute_dtype`, to be read; dequantized where its values are looked at, and not before."""
        return WeightView.of(self)


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
