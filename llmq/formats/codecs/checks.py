"""Checks that the layouts share: of tensors in a file, of tensors before they are written, of grids in config.json.

All checks raise `FormatError` with what was found and what was expected.  Codes are the quantized values, zeros the
zero points.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import ConfigError, FormatError
from llmq.formats.base import Reading
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import GROUP_SIZES, WeightScheme

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def stored(
    tensors: Mapping[str, Tensor], suffix: str, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...]
) -> Tensor:
    """The tensor called `suffix`, checked to have one of the `dtypes` and the `shape` (None: any size)."""
    expected = f"{' or '.join(_dtype_name(dtype) for dtype in dtypes)} {_shape_text(shape)}"
    tensor = tensors.get(suffix)
    if tensor is None:
        present = ", ".join(sorted(tensors)) or "nothing"
        raise FormatError(f"{suffix} is missing, expected {expected}; the module has {present}")
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, stored_size) for size, stored_size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        present = f"{_dtype_name(tensor.dtype)} {_shape_text(tuple(tensor.shape))}"
        raise FormatError(f"{suffix} is {present}, expected {expected}")
    return tensor


def groups_for(scheme: WeightScheme, in_features: int) -> int:
    """G; the group size must divide in_features."""
    if in_features < 1:
        raise FormatError("a weight has no input features, expected at least one")
    reason = grouping_refusal(scheme, in_features)
    if reason is not None:
        raise FormatError(reason)
    return in_features // scheme.columns_per_group(in_features)


def floats_refusal(scheme: WeightScheme, layout: str) -> str | None:
    """Why a layout of integers does not hold a grid of floats; None for other grids."""
    return None if scheme.floats is None else f"{layout} holds integers, not {scheme}; compressed-tensors holds both"


def grouping_refusal(scheme: WeightScheme, in_features: int) -> str | None:
    """Why no layout holds groups of this size for this weight, or None."""
    if in_features % scheme.columns_per_group(in_features) == 0:
        return None
    return _indivisible(scheme.group_size, in_features)


def affine(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, reading: Reading, index: Tensor | None = None
) -> QuantizedTensor:
    """The weight from codes (N, K), scales (N, G), zeros int16 (N, G) or None where they are all in the middle.

    If a symmetric grid was declared and not all zero points are in the middle, the result is asymmetric.  A group size
    that llmq does not have becomes a smaller one with the same scales, or a group index where no size divides the row.
    """
    scheme, middle = reading.scheme, 1 << (reading.bits - 1)
    if zeros is None and not scheme.symmetric:
        zeros = torch.full(scales.shape, middle, dtype=torch.int16, device=scales.device)
    if zeros is not None and scheme.symmetric:
        if bool((zeros == middle).all()):
            zeros = None
        else:
            scheme = dataclasses.replace(scheme, symmetric=False)
    K, size = codes.shape[1], reading.group
    if isinstance(size, int) and index is None:
        legal = reading.legal_group(K)
        if legal is None:
            index = (torch.arange(K, device=codes.device) // size).to(torch.int32)
        elif size > K or (size == K and reading.stored_group):
            scheme = dataclasses.replace(scheme, group_size="channel")
        elif legal != size:
            which = torch.arange(0, K, legal, device=codes.device) // size
            scales, zeros = scales[:, which], None if zeros is None else zeros[:, which]
            scheme = dataclasses.replace(scheme, group_size=legal)
    zeros = None if zeros is None else zeros.contiguous()
    return QuantizedTensor(codes, scales.contiguous(), zeros, scheme, index)


def groups_of(reading: Reading, in_features: int, *, cut: bool = False) -> int:
    """G of a file; with `cut` the last group may be incomplete."""
    if in_features < 1:
        raise FormatError("a weight has no input features, expected at least one")
    size = reading.group if isinstance(reading.group, int) else in_features
    if in_features % size and not cut:
        raise FormatError(_indivisible(size, in_features))
    return -(-in_features // size)


def group_index_for(reading: Reading, index: Tensor | None, in_features: int) -> Tensor | None:
    """The group index (K,) of a file -> int32 (K,), or None where it is k // group size.

    Early writers used an index of zeros as a placeholder; other readers also take it as the natural order.  Negative
    groups count from the end, as in Python.
    """
    if index is None or not bool(index.any()):
        return None
    size = reading.group if isinstance(reading.group, int) else in_features
    groups = -(-in_features // size)
    index = torch.where(index < 0, index + groups, index).to(torch.int32)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise FormatError(f"the group index holds {low} to {high}, expected 0 to {groups - 1}")
    plain = torch.arange(in_features, dtype=torch.int32, device=index.device) // size
    return None if torch.equal(index, plain) else index.contiguous()


def plain_index(scheme: WeightScheme, in_features: int, device: torch.device) -> Tensor:
    """int32 (K,): the group of each column where columns are grouped in natural order."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // scheme.columns_per_group(in_features)


def require_packable(q: QuantizedTensor, refusal: str | None) -> None:
    """Raise FormatError for a tensor that the file could not represent exactly."""
    N, K = q.shape
    if refusal is not None:
        raise FormatError(refusal)
    if q.group_index is not None and not torch.equal(q.group_index, plain_index(q.scheme, K, q.codes.device)):
        raise FormatError(
            "the columns are grouped in activation order, which serving engines ignore or refuse",
            hint="quantize the original model; llmq's activation order keeps the groups in natural order",
        )
    fields = {"codes": q.codes, "scales": q.scales}
    stored(fields, "codes", (torch.uint8,), (N, K))
    stored(fields, "scales", SCALE_DTYPES, (N, groups_for(q.scheme, K)))
    if int(q.codes.max()) > q.scheme.levels:
        raise FormatError(f"a code is {int(q.codes.max())}, expected at most {q.scheme.levels}")
    if not bool(q.scales.isfinite().all()):
        raise FormatError("a scale is not finite")
    _require_zeros(q)


def _require_zeros(q: QuantizedTensor) -> None:
    if (q.zeros is None) != q.scheme.symmetric:
        mistake = "no zero points, expected some" if q.zeros is None else "zero points, expected none"
        raise FormatError(f"a tensor on a grid {q.scheme} has {mistake}")
    if q.zeros is None:
        return
    stored({"zeros": q.zeros}, "zeros", (torch.int16,), tuple(q.scales.shape))
    low, high = int(q.zeros.min()), int(q.zeros.max())
    if low < 0 or high > q.scheme.levels:
        raise FormatError(f"zero points are {low} to {high}, expected 0 to {q.scheme.levels}")


def declared(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these keys in `config`; writers use different names."""
    for name in names:
        if name in config:
            return config[name]
    present = ", ".join(sorted(config)) or "nothing"
    raise FormatError(f"quantization_config has no {' or '.join(names)}; found {present}")


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    """`value`, checked to be a block of keys; `key` names it in the error."""
    if not isinstance(value, Mapping):
        raise FormatError(f"quantization_config holds {value!r} for {key}, expected a block of keys")
    return value


def names_in(value: Any, key: str) -> Sequence[str]:
    """`value`, checked to be a list of names; None is an empty list.  `key` names it in the error."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value) or isinstance(value, str):
        raise FormatError(f"quantization_config holds {value!r} for {key}, expected a list of names")
    return value


def declared_grid(bits: Any, group_size: Any, symmetric: Any, allowed_bits: Sequence[int]) -> Reading:
    """The grid that a configuration declares; group size -1 is one group per row."""
    if type(bits) is not int or bits not in allowed_bits:
        allowed = ", ".join(str(b) for b in allowed_bits)
        raise FormatError(f"the configuration declares {bits!r} bits, expected one of {allowed}")
    if not isinstance(symmetric, bool):
        raise FormatError(f"the configuration declares symmetry as {symmetric!r}, expected true or false")
    size: Any = "channel" if group_size == -1 else group_size
    stored = 0
    if type(size) is int and size not in GROUP_SIZES:
        stored, size = size, max((legal for legal in GROUP_SIZES if size > 0 and size % legal == 0), default=size)
    try:
        return Reading(WeightScheme(bits, size, symmetric), stored_group=stored)
    except ConfigError as error:
        raise FormatError(f"the configuration declares a grid that llmq does not have: {error}") from None


def as_stored(schemes: Mapping[str, WeightScheme]) -> dict[str, WeightScheme]:
    """The grids as the file stores them: "tensor" becomes "channel", with the same scale in every row."""
    if not schemes:
        raise ConfigError("no module is quantized, so there is no quantized checkpoint to describe")
    return {
        name: dataclasses.replace(scheme, group_size="channel") if scheme.group_size == "tensor" else scheme
        for name, scheme in schemes.items()
    }


def is_head(module: str) -> bool:
    """Whether the module is the lm_head, for which gptq and awq files have the separate key `lm_head`."""
    return module.rpartition(".")[2] == "lm_head"


def _indivisible(group_size: object, in_features: int) -> str:
    return f"a group size of {group_size} does not divide {in_features} input features, as every format requires"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
