"""What the layouts check alike: tensors found in a file, tensors about to be written, grids declared in config.json.

All of it raises `FormatError` with what was found and what was expected.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.config import Scheme
from llmq.errors import ConfigError, FormatError
from llmq.quantized import QuantizedTensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def stored(
    tensors: Mapping[str, Tensor], suffix: str, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...]
) -> Tensor:
    """The tensor called `suffix`, of one of the dtypes and the shape (None: any size)."""
    expected = f"{' or '.join(_dtype_name(dtype) for dtype in dtypes)} {_shape_text(shape)}"
    tensor = tensors.get(suffix)
    if tensor is None:
        present = ", ".join(sorted(tensors)) or "nothing"
        raise FormatError(f"{suffix} is missing, expected {expected}; the module has {present}")
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        found = f"{_dtype_name(tensor.dtype)} {_shape_text(tuple(tensor.shape))}"
        raise FormatError(f"{suffix} is {found}, expected {expected}")
    return tensor


def groups_for(scheme: Scheme, in_features: int) -> int:
    """G; a group size must divide in_features."""
    if in_features < 1:
        raise FormatError("a weight has no input features, expected at least one")
    reason = grouping_refusal(scheme, in_features)
    if reason is not None:
        raise FormatError(reason)
    return in_features // scheme.columns_per_group(in_features)


def grouping_refusal(scheme: Scheme, in_features: int) -> str | None:
    """Why no layout holds groups of such a size for such a weight, or None."""
    if in_features % scheme.columns_per_group(in_features) == 0:
        return None
    return f"a group size of {scheme.group_size} does not divide {in_features} input features, as every format requires"


def zeros_for(scheme: Scheme, zeros: Tensor) -> Tensor | None:
    """int16 (N, G) as read -> None for a symmetric grid, whose zeros must all be in the middle."""
    if not scheme.symmetric:
        return zeros
    if not bool((zeros == scheme.middle).all()):
        low, high = int(zeros.min()), int(zeros.max())
        raise FormatError(
            f"the configuration says symmetric, so every zero should be {scheme.middle}; found {low} to {high}",
            hint="if the file was written with zeros of its own, its configuration should say so",
        )
    return None


def group_index_for(scheme: Scheme, index: Tensor) -> Tensor | None:
    """int32 (K,) as read -> None where it says no more than k // group size.

    All zeros with several groups is a placeholder of early writers, and read by others as the plain order too.
    """
    groups = groups_for(scheme, index.shape[0])
    if not bool(index.any()) or torch.equal(index, plain_index(scheme, index.shape[0], index.device)):
        return None
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise FormatError(f"the group index holds {low} to {high}, expected 0 to {groups - 1}")
    return index.contiguous()


def plain_index(scheme: Scheme, in_features: int, device: torch.device) -> Tensor:
    """int32 (K,): the group of each column where columns are grouped as they stand."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // scheme.columns_per_group(in_features)


def require_packable(q: QuantizedTensor, refusal: str | None) -> None:
    """Stop a tensor that would be written as something else than it is."""
    N, K = q.shape
    if refusal is not None:
        raise FormatError(refusal)
    if q.group_index is not None and not torch.equal(q.group_index, plain_index(q.scheme, K, q.codes.device)):
        raise FormatError(
            "the columns are grouped in an order of their own, which serving engines drop or refuse",
            hint="quantize the original model; activation order does not need it here",
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
        raise FormatError(f"a tensor on a grid {q.scheme} has {'no zeros' if q.zeros is None else 'zeros'}")
    if q.zeros is None:
        return
    stored({"zeros": q.zeros}, "zeros", (torch.int16,), tuple(q.scales.shape))
    low, high = int(q.zeros.min()), int(q.zeros.max())
    if low < 0 or high > q.scheme.levels:
        raise FormatError(f"zeros are {low} to {high}, expected 0 to {q.scheme.levels}: nothing else can be packed")


def declared(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these keys that config.json has; writers spell them differently."""
    for name in names:
        if name in config:
            return config[name]
    found = ", ".join(sorted(config)) or "nothing"
    raise FormatError(f"quantization_config has no {' or '.join(names)}; found {found}")


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """The value itself, if it is a block of keys as `what` should be."""
    if not isinstance(value, Mapping):
        raise FormatError(f"quantization_config holds {value!r} for {what}, expected a block of keys")
    return value


def names_in(value: Any, what: str) -> Sequence[str]:
    """The value itself, if it is a list of names as `what` should be; none at all is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value) or isinstance(value, str):
        raise FormatError(f"quantization_config holds {value!r} for {what}, expected a list of names")
    return value


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression over module names."""
    try:
        return re.compile(text)
    except re.error as error:
        raise FormatError(f"quantization_config holds the pattern {text!r}, which is none: {error}") from None


def declared_scheme(bits: Any, group_size: Any, symmetric: Any, allowed_bits: Sequence[int]) -> Scheme:
    """The grid that a configuration declares; group size -1 is one group a row."""
    if bits not in allowed_bits:
        allowed = ", ".join(str(b) for b in allowed_bits)
        raise FormatError(f"the configuration declares {bits!r} bits, expected one of {allowed}")
    if not isinstance(symmetric, bool):
        raise FormatError(f"the configuration declares symmetry as {symmetric!r}, expected true or false")
    try:
        return Scheme(bits, "channel" if group_size == -1 else group_size, symmetric)
    except ConfigError as error:
        raise FormatError(f"the configuration declares a grid that llmq does not have: {error}") from None


def as_stored(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The grids that the file will show: "tensor" is written as one scale a row, the same one in each."""
    if not schemes:
        raise ConfigError("no module is quantized, so there is no quantized checkpoint to describe")
    return {
        name: dataclasses.replace(scheme, group_size="channel") if scheme.group_size == "tensor" else scheme
        for name, scheme in schemes.items()
    }


def is_head(module: str) -> bool:
    """Whether gptq and awq files tell by their key `lm_head` if the module is quantized."""
    return module.rpartition(".")[2] == "lm_head"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
