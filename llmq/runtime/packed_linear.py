"""A linear layer whose weight is packed in memory, with any number of bits, and runs through one op."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.numerics.fake_quantize import int8_values, rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme
from llmq.runtime.weight_view import WeightView
from llmq_kernels.w4a16 import int8_inputs, layout, small_batches
from llmq_kernels.w4a16 import op as packed
from llmq_kernels.w4a16.launches import Launches
from llmq_kernels.w4a16.packed_weight import PackedWeight


class PackedRows(nn.Module):
    """y = x Wᵀ + bias with W (N, K) held as `words` (N, Kp / 16 * bits) int16, scales (G, N), zeros (G, N) or None.

    If the columns of a checkpoint are grouped by act-order, the values are stored group by group, and `column_order`
    (K,) maps columns to inputs.

    If the checkpoint declares quantized inputs, x is rounded to their values first (`numerics/fake_quantize.py`), and
    the product is computed in float32, or for inputs in int8 with integers, if the CPU is fast at that.

    On a CPU, `prepare` adds a second copy of the weight, `cpu_words` and `cpu_grid`. With float inputs it makes small
    batches of 4 and 8 bits several times faster, in bfloat16 (`llmq_kernels/w4a16/small_batches.py`). With inputs in
    int8 it holds the integers (`int8_inputs.py` there). The copy is never saved, and is made again when the weight
    moves or changes.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    column_order: Tensor | None
    cpu_words: Tensor | None
    cpu_grid: Tensor | None

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
        inputs: InputScheme | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear.__init__, which creates a weight
        codes, order = quantized.codes, _column_order(quantized)
        if order is not None:
            codes = codes[:, order]
        zeros = None if quantized.zeros is None else quantized.zeros.T.contiguous()
        words = layout.pack(codes, quantized.scheme.bits)
        self._hold(quantized.scheme, quantized.shape[1], words, quantized.scales.T.contiguous(), zeros, order, bias)
        self.compute_dtype = dtype or quantized.scales.dtype
        self._round_inputs(inputs)

    @classmethod
    def stacked(cls, layers: Sequence["PackedRows"]) -> "PackedRows":
        """Stack the rows of several layers, in order; the buffers are new.

        The layers must have the same bits, columns per group, dtype of scales, order of columns, and quantization of
        inputs. If only some have zero points, 2**(bits - 1) is used for the others; if only some have a bias, 0 is used
        for the others.
        """
        first, zeros, bias = layers[0], None, None
        scheme = first.scheme
        if any(layer.zeros is not None for layer in layers):
            scheme = replace(scheme, symmetric=False)
            zeros = torch.cat([layer._explicit_zeros() for layer in layers], dim=1)  # (G, N)
        with_bias = next((layer.bias for layer in layers if layer.bias is not None), None)
        if with_bias is not None:
            parts = (with_bias.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers)
            bias = torch.cat(list(parts))
        words, scales = torch.cat([layer.words for layer in layers]), torch.cat([x.scales for x in layers], dim=1)
        stacked = cls.__new__(cls)
        nn.Module.__init__(stacked)
        stacked._hold(scheme, first.in_features, words, scales, zeros, first.column_order, bias)
        stacked.compute_dtype = first.compute_dtype
        stacked._round_inputs(first.inputs)
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
        self.register_buffer("cpu_words", None, persistent=False)
        self.register_buffer("cpu_grid", None, persistent=False)
        self.prepared = False
        self._launches = Launches()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _round_inputs(self, inputs: InputScheme | None) -> None:
        self.inputs = inputs
        self.rounding = None if inputs is None else rounding_for(inputs)

    def _explicit_zeros(self) -> Tensor:
        """The zero points, (G, N) int16, also for a symmetric layer."""
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, self.scheme.middle, dtype=torch.int16)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self._packed_weight()  # named as in nn.Linear, so that it can be given by its keyword
        if self.rounding is None:
            return packed.linear(x, weight, self.bias, self._launches)
        without_copy = weight._replace(cpu_words=None, cpu_grid=None)
        if weight.cpu_words is not None and x.numel() and packed.is_plain_inference(x, self.bias):
            packed.check(x, without_copy, self.bias)
            return self._product_of_integers(x, weight)
        return packed.linear(self.rounding(x), without_copy, self.bias, self._launches)

    def _product_of_integers(self, x: Tensor, weight: PackedWeight[Tensor]) -> Tensor:
        """The product of x (…, K), rounded to int8, on a CPU, in the dtype of x or of autocast."""
        assert self.inputs is not None and weight.cpu_words is not None and weight.cpu_grid is not None
        values, scale = int8_values(x, self.inputs.scale)
        rows = values.reshape(-1, self.in_features)
        y = int8_inputs.linear(rows, weight.cpu_words, weight.cpu_grid, self.column_order).view(*x.shape[:-1], -1)
        y *= scale
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return (y if self.bias is None else y + self.bias).to(dtype)

    def _packed_weight(self) -> PackedWeight[Tensor]:
        held: Any = self._buffers  # faster than the attribute lookup of nn.Module, and this runs in every call
        return PackedWeight(
            held["words"], held["scales"], held["zeros"], self.scheme.bits, self.in_features, self.columns_per_group,
            held["column_order"], held["cpu_words"], held["cpu_grid"],
        )  # fmt: skip

    def prepare(self) -> None:
        """Make the faster copy for the device, if there is one; called after all layers are loaded."""
        self.prepared = True
        own = self._own_copy()
        pair = None if own is None else own.prepare(self._packed_weight())
        self.cpu_words, self.cpu_grid = pair or (None, None)

    def _own_copy(self) -> ModuleType | None:
        """What makes the second copy of the weight, and multiplies with it."""
        if self.inputs is None:
            return small_batches
        return int8_inputs if self.inputs.dtype == "int8" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedRows":
        """Move or cast the module (`.to`, `.half`). This copy is not cast, and other devices have none.

        The scales are moved but not cast: they pass as integers.
        """
        pair, before = (self.cpu_words, self.cpu_grid), self._sources()
        self.cpu_words = self.cpu_grid = None
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        dtype = self.scales.dtype
        self.scales = self.scales.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self.scales.view(dtype)
        if self.prepared and self._sources() != before:
            self.prepare()
        else:
            self.cpu_words, self.cpu_grid = pair
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.prepared:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copy for CPUs: another processor may read a saved module."""
        return {**self.__dict__, "_buffers": {**self._buffers, "cpu_words": None, "cpu_grid": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.prepared:
            self.prepare()

    def _sources(self) -> list[tuple[int, torch.dtype, torch.device]]:
        """Identifies the memory that the copy for CPUs was made from."""
        return [(t.data_ptr(), t.dtype, t.device) for t in (self.words, self.scales, self.zeros) if t is not None]

    def quantized(self, rows: slice = slice(None)) -> QuantizedTensor:
        """The original weight of the layer, exactly, or some of its rows."""
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
        return f"in_features={self.in_features}, out_features={self.out_features}, {Scheme(self.scheme, self.inputs)}"


class PackedLinear(PackedRows, nn.Linear):  # type: ignore[misc]  # a layer may have no bias
    """The rows as an `nn.Linear`, for code that checks the type of a layer, such as PEFT."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K) in `compute_dtype`, read-only; dequantized only when its values are used."""
        return WeightView.of(self)


def _column_order(quantized: QuantizedTensor) -> Tensor | None:
    """(K,) int64, the order in which the columns of each group are contiguous, or None if they already are."""
    if quantized.group_index is None:
        return None
    order = torch.argsort(quantized.group_index.long(), stable=True)
    per_group = quantized.scheme.columns_per_group(len(order))
    expected = torch.arange(len(order), device=order.device) // per_group
    if not torch.equal(quantized.group_index.long()[order], expected):
        raise FormatError(
            f"g_idx does not assign {per_group} columns to every group", hint="the checkpoint is damaged or not GPTQ"
        )
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
