"""Checks of tensor arguments that all ops share, and the words of their errors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)


def require(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Raise KernelInputError unless `tensor` has one of the dtypes, the shape and the device of the other arguments."""
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise KernelInputError(f"{name}: found {described(tensor)}, expected {listed(dtypes)} {shape}")
    if tensor.device != device:
        raise KernelInputError(f"{name}: found on {tensor.device}, expected on {device} like the other tensors")
    if contiguous and not tensor.is_contiguous():
        raise KernelInputError(f"{name}: found strides {tensor.stride()} for shape {shape}, expected contiguous")


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def listed(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))
